// The autograd node of calls whose own cost shows: float32 in training mode, x contiguous, no residual. It calls
// cpu.cpp's functions. build.py compiles it if asked to; without it, and for all other calls, autograd is in Python.
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

using at::Tensor;
using torch::autograd::Node, torch::autograd::SavedVariable, torch::autograd::variable_list;
static_assert(std::is_same_v<decltype(torch::autograd::Edge::function), c10::intrusive_ptr<Node>>,
              "this version of PyTorch is too old for the autograd node");

struct call { // that of cpu.cpp
    const void *x, *residual, *dy;
    void *y, *dx, *dresidual;
    const void *weight, *bias;
    void *mean, *var, *running_mean, *running_var, *dweight, *dbias, *signs;
    int64_t examples, channels, positions, rows, activation, frozen, threads;
    double eps, momentum;
};
using function = int (*)(const call *); // not 0 where it found no memory for its sums
static function run_forward, run_backward;
static const char *const ACTIVATIONS[] = {"none", "relu", "leaky_relu", "silu"}; // as cpu.py numbers them
static const char *const NO_MEMORY = "out of memory: the fused kernel could not allocate its sums";
static bool forward_mode() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }
static bool eager() { // no dispatch mode, transform or trace, which must see the operator, and no inference mode
    auto keys = c10::impl::tls_local_dispatch_key_set();
    return keys.included_ == c10::default_included_set && (keys.excluded_ - c10::autocast_dispatch_keyset).empty();
}

static bool plain(const Tensor &t) { // float32, dense, on the CPU, no transform's, no conjugate, no inference's
    static const auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU) |
                             c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
                             c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit);
    return t.key_set() == keys && t.scalar_type() == at::kFloat;
}

// Whether the pointers of x (N, C, *S) and of the vectors (C), some of them undefined, can be read.
static bool readable(const Tensor &x, std::initializer_list<const Tensor *> vectors) {
    for (auto *v : vectors)
        if (v->defined() && !(plain(*v) && v->dim() == 1 && v->size(0) == x.size(1) && v->is_contiguous()))
            return false;
    return plain(x) && x.is_contiguous();
}

static Tensor made(at::IntArrayRef sizes) { return at::detail::empty_cpu(sizes, at::kFloat); }
static void *pointer(const Tensor &t) { return t.defined() ? const_cast<void *>(t.const_data_ptr()) : nullptr; }

static int run(function function, call c, const Tensor &x, int64_t activation, double eps) {
    c.x = pointer(x), c.activation = activation, c.eps = eps, c.threads = at::get_num_threads();
    c.examples = x.size(0), c.channels = x.size(1), c.positions = x.numel() / (c.examples * c.channels);
    c.rows = c.channels > 1 && c.positions == 1; // as layout.is_channels_last says
    return function(&c);
}

struct FusedBatchNormBackward : public Node {
    SavedVariable saved[5]; // x, weight, bias, mean, var
    int64_t activation;
    double eps;

    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs &) const override {
        TORCH_CHECK_NOT_IMPLEMENTED(false, "compiled autograd cannot take the C++ autograd node of the fused kernel: "
                                           "compile the forward pass too, or delete node-*.so in the cache of kernels");
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto &each : saved) each.reset_data();
    }

    variable_list apply(variable_list &&gradients) override {
        std::lock_guard<std::mutex> lock(mutex_);
        Tensor dy = gradients[0], x = saved[0].unpack(), weight = saved[1].unpack(), bias = saved[2].unpack(),
               mean = saved[3].unpack(), var = saved[4].unpack(), dx, dweight, dbias;
        if (!dy.defined()) return variable_list(3);
        bool twice = at::GradMode::is_enabled(); // backward is differentiated too
        TORCH_CHECK(twice || !forward_mode(), "the fused kernel has no forward-mode derivative");
        if (dy.strides() != x.strides()) dy = dy.contiguous(x.suggest_memory_format());
        bool same = plain(dy) && dy.sizes() == x.sizes() && readable(x, {&weight, &bias, &mean, &var});
        if (same && eager() && !twice) {
            dx = made(x.sizes()), dweight = made({x.size(1)}), dbias = made({x.size(1)});
            call c{.dy = pointer(dy), .dx = pointer(dx), .weight = pointer(weight), .bias = pointer(bias),
                   .mean = pointer(mean), .var = pointer(var), .dweight = pointer(dweight), .dbias = pointer(dbias)};
            TORCH_CHECK(!run(run_backward, c, x, activation, eps), NO_MEMORY);
        } else {
            static const auto backward_operator =
                c10::Dispatcher::singleton().findSchemaOrThrow("bncli::fused_batch_norm_backward", "");
            auto optional = [](const Tensor &t) { return t.defined() ? c10::IValue(t) : c10::IValue(); };
            torch::jit::Stack stack{dy, x, optional(weight), optional(bias), c10::IValue(), mean, var, c10::IValue(),
                                    eps, ACTIVATIONS[activation], false, false, false};
            backward_operator.callBoxed(&stack);
            dx = stack[0].toTensor(), dweight = stack[1].toTensor(), dbias = stack[2].toTensor();
        }
        return {dx, weight.defined() ? dweight : Tensor(), bias.defined() ? dbias : Tensor()};
    }
};

// (x, weight, bias, running_mean, running_var, momentum, eps, activation) -> (y, mean, var), or None for a call that
// Python must compute or refuse.
static PyObject *forward(PyObject *, PyObject *const *given, Py_ssize_t) {
    HANDLE_TH_ERRORS
    Tensor tensors[5];
    for (int i = 0; i < 5; i++)
        if (given[i] != Py_None) {
            if (!THPVariable_CheckExact(given[i])) Py_RETURN_NONE;
            tensors[i] = THPVariable_Unpack(given[i]);
        }
    auto &[x, weight, bias, running_mean, running_var] = tensors;
    double momentum = PyFloat_AsDouble(given[5]), eps = PyFloat_AsDouble(given[6]);
    int64_t activation = PyLong_AsLongLong(given[7]);
    if (PyErr_Occurred()) return nullptr;
    bool constant = !(running_mean.defined() && (running_mean.requires_grad() || running_var.requires_grad()));
    if (!eager() || forward_mode() || x.dim() < 2 || x.numel() == 0 || !constant ||
        !readable(x, {&weight, &bias, &running_mean, &running_var}))
        Py_RETURN_NONE;
    RECORD_FUNCTION("bncli::fused_batch_norm", c10::ArrayRef<const c10::IValue>{});
    Tensor y = made(x.sizes()), mean = made({x.size(1)}), var = made({x.size(1)});
    call c{.y = pointer(y), .weight = pointer(weight), .bias = pointer(bias), .mean = pointer(mean),
           .var = pointer(var), .running_mean = pointer(running_mean), .running_var = pointer(running_var),
           .momentum = momentum};
    int failed;
    Py_BEGIN_ALLOW_THREADS failed = run(run_forward, c, x, activation, eps);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_Format(PyExc_MemoryError, NO_MEMORY);
    if (torch::autograd::compute_requires_grad(x, weight, bias)) {
        auto node = c10::make_intrusive<FusedBatchNormBackward>();
        node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
        const Tensor *kept[] = {&x, &weight, &bias, &mean, &var};
        for (int i = 0; i < 5; i++) node->saved[i] = SavedVariable(*kept[i], false);
        node->activation = activation, node->eps = eps;
        torch::autograd::set_history(y, node);
    }
    for (const auto &moved : {running_mean, running_var})
        if (moved.defined()) torch::autograd::impl::bump_version(moved);
    return Py_BuildValue("(NNN)", THPVariable_Wrap(y), THPVariable_Wrap(mean), THPVariable_Wrap(var));
    END_HANDLE_TH_ERRORS
}

extern "C" PyObject *node(function forward_in_cpu, function backward_in_cpu) { // cpu.cpp's for float32 -> forward
    static PyMethodDef definition = {"forward", (PyCFunction)(void *)forward, METH_FASTCALL, nullptr};
    run_forward = forward_in_cpu, run_backward = backward_in_cpu;
    return PyCFunction_New(&definition, nullptr);
}
