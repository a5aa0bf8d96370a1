"""The recipes are beside the package in the repository and inside it in a wheel; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["bncli*"]), "bncli.recipes"], package_dir={"bncli.recipes": "recipes"})
