"""Recipes that bncli comes with: their names, purposes and texts, and the fields of a recipe as the schema has them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from bncli.errors import UsageError
from bncli.recipe import examples
from bncli.recipe.sections import RecipeFile
from tests.recipe.conftest import models

RECIPES = Path(__file__).parents[2] / "recipes"


def test_every_recipe_and_every_python_file_beside_one_is_an_example() -> None:
    shipped = [*RECIPES.rglob("*.yaml"), *RECIPES.rglob("*.py")]
    assert sorted(examples.files().values()) == sorted(shipped)
    assert {"smoke", "digits", "own/npz", "own/images", "own/model.py", "own/data.py"} <= examples.files().keys()


def test_every_example_says_on_one_line_what_it_is_for() -> None:
    purposes = examples.purposes()
    assert purposes.keys() == examples.files().keys()
    assert all(10 < len(purpose) < 100 for purpose in purposes.values())
    assert purposes["smoke"] == "see in a few seconds that an installation trains"
    assert purposes["digits"] == "how many times fewer steps does batch norm need?"
    assert purposes["own/model.py"].startswith("Models of your own")


@pytest.mark.parametrize("name", ["smoke", "own/npz", "own/model.py", "smoke.yaml", "recipes/smoke.yaml"])
def test_an_example_is_printed_as_it_is_with_the_place_of_the_schema(name: str) -> None:
    file = examples.files()[name.removeprefix("recipes/").removesuffix(".yaml")]
    text = examples.text(name)
    if file.suffix == ".yaml":
        (uri,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.M)
        assert Path(url2pathname(urlparse(uri).path)).samefile(RECIPES / "recipe.schema.json")
    assert text.splitlines()[1:] == file.read_text().splitlines()[1:]


def test_a_name_that_is_none_has_the_nearest_suggested() -> None:
    with pytest.raises(UsageError, match=r"smok: did you mean smoke\?"):
        examples.text("smok")
    with pytest.raises(UsageError, match=r"qqqqqq: expected batch-size, .* or list"):
        examples.text("qqqqqq")


def test_the_fields_are_those_of_every_section_and_kind() -> None:
    fields = dict(examples.fields())
    sections = models(RecipeFile) - {RecipeFile}
    last = {field.rpartition(".")[2] for field in fields}
    assert last >= {name for section in sections for name in section.model_fields} - set_of_claims()
    assert {"optimizer.lr", "norm.momentum", "model.init.std", "train.target.also", "probes.measure"} <= fields.keys()
    assert fields["optimizer.lr"] == "learning rate"


def set_of_claims() -> set[str]:
    """Fields of the elements of a list, which a flag cannot name."""
    return {"say", "arm", "over", "at_least", "at_most", "expect", "when", "layer"}


def test_examples_are_found_without_anything_heavy() -> None:
    code = (
        "import sys; from bncli.recipe import examples; examples.text('own/npz'); examples.purposes();"
        "list(examples.fields()); print(*{'torch', 'pydantic', 'numpy', 'yaml'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
