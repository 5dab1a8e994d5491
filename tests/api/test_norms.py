"""Layer norm and RMS norm of sums beside formulas in float64: results, gradients, masks, messages."""

import pytest
import torch

from flash_attn.ops import layer_norm as old_layer_norm
from flash_attn.ops import rms_norm as old_rms_norm
from flash_attn.ops.triton import layer_norm as norms
from plain_attention import assert_near, assert_same, leaves

SHAPE = (2, 5, 24)
# Rounding of the results: they are computed in float32 at least.
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
TENSORS = {
    "x": SHAPE, "weight": SHAPE[-1:], "bias": SHAPE[-1:], "residual": SHAPE, "x1": SHAPE, "weight1": SHAPE[-1:],
    "bias1": SHAPE[-1:], "rowscale": SHAPE[:-1],
}  # fmt: skip

# Tensors beside x and weight, options.
CASES = {
    "plain": ("", {}),
    "bias": ("bias", {}),
    "eps": ("bias", {"eps": 0.5}),
    "residual": ("bias residual", {}),
    "prenorm": ("bias residual", {"prenorm": True}),
    "prenorm without residual": ("bias", {"prenorm": True}),
    "prenorm, float32": ("bias", {"prenorm": True, "residual_in_fp32": True}),
    "rowscale": ("bias residual rowscale", {"prenorm": True}),
    "x1": ("bias x1", {"prenorm": True}),
    "two results": ("bias residual weight1 bias1", {}),
    "parallel": ("bias residual x1 weight1 bias1", {"prenorm": True, "zero_centered_weight": True}),
    "second without bias": ("residual x1 weight1", {}),
    "zero-centred": ("bias", {"zero_centered_weight": True}),
    "dropout": ("bias residual", {"dropout_p": 0.3, "prenorm": True, "return_dropout_mask": True}),
    "dropout of rows": ("residual rowscale", {"dropout_p": 0.5, "return_dropout_mask": True}),
    "dropout, parallel": (
        "bias residual x1 weight1 bias1", {"dropout_p": 0.4, "prenorm": True, "return_dropout_mask": True}
    ),
    "masks without dropout": ("bias x1", {"return_dropout_mask": True}),
}  # fmt: skip


def make_inputs(names, dtype, parameters=torch.float32):
    """The named tensors, x and weight; those of the size of weight have the dtype of parameters."""
    made = dict(zip(TENSORS, leaves(*TENSORS.values()), strict=True))
    wanted = {"x", "weight", *names.split()}
    inputs = {name: x for name, x in made.items() if name in wanted}
    of = {name: parameters if x.dim() == 1 and dtype != torch.float64 else dtype for name, x in inputs.items()}
    return {name: x.detach().to(of[name]).requires_grad_() for name, x in inputs.items()}


def formula(is_rms_norm, masks, x, weight, bias=None, residual=None, x1=None, weight1=None, bias1=None, rowscale=None,
            eps=1e-6, dropout_p=0.0, zero_centered_weight=False):  # fmt: skip
    """The first result, the second or None, and total."""
    total = x if rowscale is None else x * rowscale[..., None]
    total = total if masks[0] is None else total * masks[0] / (1 - dropout_p)
    if x1 is not None:
        total = total + (x1 if masks[1] is None else x1 * masks[1] / (1 - dropout_p))
    total = total if residual is None else total + residual
    centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    results = []
    for factor, shift in ((weight, bias), (weight1, bias1)):
        factor = factor + 1 if zero_centered_weight and factor is not None else factor
        results.append(None if factor is None else unit * factor + (0 if shift is None else shift))
    return *results, total


def split(returned, inputs, options):
    """first result, second, total, masks of what a function returned; None where it returns none."""
    returned = list(returned) if isinstance(returned, tuple) else [returned]
    masks = [returned.pop(-2), returned.pop()] if options.get("return_dropout_mask") else [None, None]
    total = returned.pop() if options.get("prenorm") else None
    second = returned.pop() if "weight1" in inputs else None
    (first,) = returned
    return first, second, total, masks


def assert_within(actual, expected, error):
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=error, atol=error)


def dtypes_of(dtype, options):
    """The dtypes of both results and total."""
    full = torch.float64 if dtype == torch.float64 else torch.float32
    return dtype, dtype, full if options.get("residual_in_fp32") else dtype


def check(is_rms_norm, names, options, dtype, parameters=torch.float32):
    inputs = make_inputs(names, dtype, parameters)
    function = norms.rms_norm_fn if is_rms_norm else norms.layer_norm_fn
    *outputs, masks = split(function(**{"bias": None, **inputs}, **options), inputs, options)
    drops = options.get("dropout_p", 0) > 0
    assert [mask is not None for mask in masks] == [drops, drops and "x1" in inputs]
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    arguments = {name: x for name, x in options.items() if name in ("eps", "dropout_p", "zero_centered_weight")}
    expected = formula(is_rms_norm, masks, **exact, **arguments)
    given = [i for i, x in enumerate(outputs) if x is not None]
    assert [outputs[i].dtype for i in given] == [dtypes_of(dtype, options)[i] for i in given]
    upstream = [torch.linspace(i, 9, 240, dtype=torch.float64).reshape(SHAPE).cos() for i in given]
    for i in given:
        assert_within(outputs[i], expected[i], ERROR[dtype])
    rounded = [g.to(outputs[i].dtype) for i, g in zip(given, upstream, strict=True)]
    gradients = torch.autograd.grad([outputs[i] for i in given], list(inputs.values()), rounded)
    exact_gradients = torch.autograd.grad([expected[i] for i in given], list(exact.values()), upstream)
    for name, actual, wanted in zip(inputs, gradients, exact_gradients, strict=True):
        assert actual.dtype == inputs[name].dtype
        assert_within(actual, wanted, 2 * ERROR[dtype] * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("is_rms_norm", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, is_rms_norm, dtype):
    check(is_rms_norm, *CASES[case], dtype)


@pytest.mark.parametrize("case", ["bias", "parallel"])
def test_parameters_of_half_precision(case):
    check(False, *CASES[case], torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_total_has_the_dtype_of_the_residual(residual_in_fp32):
    inputs = make_inputs("residual", torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        inputs["residual"] = inputs["residual"].detach().to(dtype)
        out, total = norms.layer_norm_fn(**inputs, bias=None, prenorm=True, residual_in_fp32=residual_in_fp32)
        assert (out.dtype, total.dtype) == (torch.bfloat16, dtype)
        assert_same([total], [(inputs["x"].float() + inputs["residual"].float()).to(dtype)])


def test_given_buffers_and_dtypes():
    inputs = {name: x.detach() for name, x in make_inputs("bias residual weight1", torch.bfloat16).items()}
    expected = norms.layer_norm_fn(**inputs, prenorm=True)
    out, residual_out = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE, dtype=torch.bfloat16)
    found = norms.layer_norm_fn(**inputs, prenorm=True, out=out, residual_out=residual_out)
    assert found[0] is out and found[2] is residual_out
    assert_same(found, expected)
    wide = norms.layer_norm_fn(**inputs, prenorm=True, out_dtype=torch.float32)
    assert [x.dtype for x in wide] == [torch.float32, torch.float32, torch.bfloat16]
    assert_same([x.bfloat16() for x in wide], expected)


def test_masks():
    """Each input has its own mask, with the asked probability; the generator decides."""
    x = torch.ones(200, 300)
    options = {"dropout_p": 0.25, "return_dropout_mask": True, "x1": x}
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found = norms.rms_norm_fn(x, x[0], None, **options)
        torch.manual_seed(1)
        again = norms.rms_norm_fn(x, x[0], None, **options)
        assert all(torch.equal(a, b) == (seed == 1) for a, b in zip(found, again, strict=True))
    _, mask, mask1 = found
    assert mask.dtype == mask1.dtype == torch.bool
    assert abs(mask.float().mean() - 0.75) < 0.01 and abs((mask & mask1).float().mean() - 0.75**2) < 0.01


@pytest.mark.parametrize("is_rms_norm", [False, True], ids=["layer", "rms"])
def test_references_take_masks(is_rms_norm):
    names, options = CASES["dropout, parallel"]
    inputs = make_inputs(names, torch.float32)
    function, reference = norms.layer_norm_fn, norms.layer_norm_ref
    if is_rms_norm:
        function, reference = norms.rms_norm_fn, norms.rms_norm_ref
    *expected, mask, mask1 = function(**inputs, **options)
    options = {"dropout_p": options["dropout_p"], "prenorm": True, "upcast": True}
    assert_same(reference(**inputs, **options, dropout_mask=mask, dropout_mask1=mask1), expected)


def test_class_of_the_function():
    inputs = make_inputs("bias residual", torch.float32)
    x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
    arguments = (x, weight, bias, residual, None, None, None, 1e-3, 0.0, None, True)
    assert_same(norms.LayerNormFn.apply(*arguments), norms.layer_norm_fn(*arguments))


# Modules and older functions.


@pytest.mark.parametrize("zero_centered_weight", [False, True])
def test_rms_norm_module(zero_centered_weight):
    (x, residual) = leaves(SHAPE, SHAPE, dtype=torch.float32)
    module = norms.RMSNorm(24, dropout_p=0.5, zero_centered_weight=zero_centered_weight)
    assert list(module.state_dict()) == ["weight"] and module.eps == 1e-5 and module.bias is None
    expected = torch.nn.functional.rms_norm(x + residual, (24,), eps=1e-5)
    torch.manual_seed(3)
    assert (module(x) != module(x)).any()
    out, total = module.eval()(x, residual, prenorm=True, residual_in_fp32=True)
    assert_near([out, total], [expected, x + residual], atol=1e-6)
    assert norms.RMSNorm(8, dtype=torch.bfloat16, device="meta").weight.is_meta


def test_older_functions():
    inputs = make_inputs("bias residual", torch.float32)
    x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
    exact = [inputs[name].detach().double() for name in ("x", "weight", "bias")]
    found = [old_layer_norm.layer_norm(x, weight, bias, 1e-3), old_rms_norm.rms_norm(x, weight, 1e-3)]
    expected = [formula(i, (None, None), *exact[: 2 if i else 3], eps=1e-3)[0] for i in (False, True)]
    assert_near(found, expected, atol=1e-5)
    for is_rms_norm, function in (
        (False, old_layer_norm.dropout_add_layer_norm),
        (True, old_rms_norm.dropout_add_rms_norm),
    ):
        scale = torch.linspace(0.5, 2, 24)
        out, total, mask = function(x, residual, weight, bias, 0.4, 1e-3, None, scale, True, False, True)
        scaled = [exact[0] * scale.double(), *exact[1:], residual.detach().double()]
        assert_near([out, total], formula(is_rms_norm, (mask, None), *scaled, eps=1e-3, dropout_p=0.4)[::2], atol=1e-5)
        assert function(x, None, weight, bias, 0.0, 1e-3, return_dropout_mask=True)[1].all()
        assert isinstance(function(x, None, weight, bias, 0.0, 1e-3), torch.Tensor)


@pytest.mark.parametrize("prenorm", [False, True])
def test_older_modules(prenorm):
    (x, residual) = leaves(SHAPE, SHAPE, dtype=torch.float32)
    assert_same([old_rms_norm.RMSNorm(24)(x)], [old_rms_norm.rms_norm(x, torch.ones(24), 1e-5)])
    pairs = ((old_layer_norm.DropoutAddLayerNorm, ["weight", "bias"]), (old_rms_norm.DropoutAddRMSNorm, ["weight"]))
    for cls, parameters in pairs:
        module = cls(24, prenorm=prenorm, p=0.5)
        assert list(module.state_dict()) == parameters
        module.weight.data.fill_(2.0)
        module.reset_parameters()
        found = module.eval()(x, residual)
        inputs = (None, None), (x + residual).double(), torch.ones(24).double()
        expected = formula(len(parameters) == 1, *inputs, eps=1e-5)
        assert_near(found if prenorm else [found], expected[::2] if prenorm else expected[:1], atol=1e-5)
        assert (first(module.train()(x)) != first(module(x))).any()


def first(result):
    return result[0] if isinstance(result, tuple) else result


def test_under_torch_compile():
    inputs = make_inputs("bias residual x1 weight1", torch.float32)
    call = torch.compile(norms.layer_norm_fn, backend="aot_eager", fullgraph=True)
    assert_near(call(**inputs, prenorm=True), norms.layer_norm_fn(**inputs, prenorm=True), atol=1e-6)


# Messages: what is changed, the error, and its text after the name of the function.
X, W = torch.zeros(2, 3, 4), torch.zeros(4)
BAD = [
    ({"x": None}, TypeError, r"x: expected torch.Tensor, got NoneType None"),
    ({"x": X.long()}, TypeError, r"x: expected a floating dtype, got torch.int64"),
    ({"weight": None}, TypeError, r"weight: expected torch.Tensor, got NoneType None"),
    ({"residual": 1.0}, TypeError, r"residual: expected torch.Tensor or None, got float 1.0"),
    ({"out": 1.0}, TypeError, r"out: expected torch.Tensor or None, got float 1.0"),
    ({"eps": None}, TypeError, r"eps: expected float, got NoneType None"),
    ({"dropout_p": "0"}, TypeError, r"dropout_p: expected float, got str '0'"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., hidden_size\), got \(\)"),
    ({"weight": W[:3]}, ValueError, r"weight: expected shape \(4,\) for x \(2, 3, 4\), got \(3,\)"),
    ({"bias": X}, ValueError, r"bias: expected shape \(4,\) for x \(2, 3, 4\), got \(2, 3, 4\)"),
    ({"residual": X[:1]}, ValueError, r"residual: expected shape \(2, 3, 4\) for x .*, got \(1, 3, 4\)"),
    ({"x1": X[0]}, ValueError, r"x1: expected shape \(2, 3, 4\) for x .*, got \(3, 4\)"),
    ({"rowscale": W}, ValueError, r"rowscale: expected shape \(2, 3\) for x .*, got \(4,\)"),
    ({"rowscale": X[..., 0], "x1": X}, ValueError, r"rowscale: expected None together with x1, got Tensor .*"),
    ({"bias1": W}, ValueError, r"bias1: expected None without weight1, got Tensor .*"),
    ({"residual_out": X[0]}, ValueError, r"residual_out: expected shape \(2, 3, 4\) for x .*, got \(3, 4\)"),
    ({"bias": X, "x1": X[0]}, ValueError, r"2 problems:(.|\n)*bias: expected (.|\n)*x1: expected .*"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=lambda x: str(list(x)) if isinstance(x, dict) else "")
def test_messages(changes, error, text):
    for name in ("layer_norm_fn", "rms_norm_fn"):
        with pytest.raises(error, match=f"^{name}: {text}$"):
            getattr(norms, name)(**{"x": X, "weight": W, "bias": None, **changes})


def test_messages_of_modules():
    for cls, argument in ((norms.RMSNorm, "dropout_p"), (old_layer_norm.DropoutAddLayerNorm, "p")):
        text = rf"^{cls.__name__}: {argument}: expected a probability in \[0, 1\), got 1.0$"
        with pytest.raises(ValueError, match=text):
            cls(8, **{argument: 1.0})


@pytest.mark.parametrize("function", [norms.layer_norm_fn, norms.rms_norm_fn])
def test_output_into_the_input(function):
    """The sum and the second result are those of the input, of which nothing is left."""
    x, weight, weight1 = torch.randn(5, 16), torch.rand(16), torch.rand(16)
    expected = function(x, weight, None, weight1=weight1, prenorm=True)
    out = x.clone()
    found = function(out, weight, None, weight1=weight1, prenorm=True, out=out)
    assert found[0] is out
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
