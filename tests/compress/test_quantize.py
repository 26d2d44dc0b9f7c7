"""Quantised models against whole-number NumPy, compressed-tensors and transformers."""

import functools
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.compress import quantize
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.formats import compressed, sums
from jaxdistill.formats.tensor_table import tensor_rows
from jaxdistill.models import decoder, quantized
from jaxdistill.models.kernel import is_kernel
from jaxdistill.sharding import make_mesh
from tests.also import also
from tests.models import oracle

pytest.importorskip("qwix", reason="needs qwix (pip install 'jaxdistill[quant]')")

SCHEMES = tuple(quantized.SCHEMES)
RAW = oracle._case(
    "llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, head_dim=32
)
TOKENS = oracle.tokens(RAW)


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_device):
    folder = oracle.write_folder(tmp_path_factory.mktemp("q"), RAW)
    return models.load(folder, mesh=one_device, dtype="float32", tokenizer=False)


def numpy_rounding(kernel, bits, group):
    """Symmetric rounding of [in, out] by the largest magnitude of a group, in float64.

    Also where a value lies halfway between two whole numbers, as the largest of a group does.
    """
    inputs, outputs = kernel.shape
    grouped = kernel.astype(np.float64).reshape(-1, group or inputs, outputs)
    largest = np.abs(grouped).max(1, keepdims=True)
    scale = largest / (2 ** (bits - 1) - 0.5)
    values = np.clip(np.round(grouped / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    halfway = np.abs(np.abs(grouped / scale) % 1 - 0.5) < 1e-4
    return (values * scale).reshape(inputs, outputs), halfway.reshape(inputs, outputs)


@pytest.mark.parametrize(("name", "bits", "group"), [("int8", 8, None), ("int4", 4, 64)])
def test_weights_are_rounded_as_numpy_rounds_them(model, name, bits, group):
    found = quantize.quantized(model, name).params["layers"]["mlp"]["down"]["kernel"]
    assert found.values.dtype == (jnp.int4 if bits == 4 else jnp.int8)
    for layer in range(3):
        kernel = np.asarray(model.params["layers"]["mlp"]["down"]["kernel"][layer])
        want, halfway = numpy_rounding(kernel, bits, group)
        got = np.asarray(found.dequantized()[layer])
        step = np.abs(kernel).max() / (2 ** (bits - 1) - 0.5)
        assert np.abs(got - want).max() <= 1.01 * step and halfway.mean() < 0.02
        np.testing.assert_allclose(got[~halfway], want[~halfway], atol=1e-5 * step)


@pytest.mark.parametrize("name", ["int8", "int4", "float8"])
def test_logits_are_those_of_the_rounded_weights(model, name):
    """The oracle runs in float64 on whole numbers times scales, multiplied out in NumPy."""
    small = quantize.quantized(model, name)
    named = oracle.tensors(RAW)
    for ours, (theirs, _) in tensor_rows(model.config).items():
        leaf = functools.reduce(lambda node, key: node[key], ours.split("."), small.params)
        for layer in range(3) if is_kernel(leaf) else ():
            values, scale = np.asarray(leaf.values[layer], float), np.asarray(leaf.scale[layer])
            scale = np.repeat(scale, len(values) // len(scale), axis=0)
            named[theirs.pattern.format(layer)] = (values * scale).T
    got = small.logits(TOKENS)
    assert oracle.distance(got, oracle.logits(RAW, named, TOKENS)) < 3e-5
    plain = oracle.logits(RAW, oracle.tensors(RAW), TOKENS)
    assert oracle.distance(got, plain) > 1e-3  # and they are rounded at all


def test_dynamic_int8_adds_up_whole_numbers():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 64)).astype(np.float32), rng.normal(size=(64, 48)).astype(np.float32)
    kernel = quantized.quantize(jnp.asarray(w), quantized.SCHEMES["int8_dynamic"])
    # The largest of a row lies halfway to a number past the end; positive, it is 127 either way.
    x *= np.sign(np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1))
    step = np.abs(x).max(1, keepdims=True) / np.float32(127.5)
    rounded = np.clip(np.round(x / step), -128, 127).astype(np.int64)
    whole = rounded @ np.asarray(kernel.values).astype(np.int64)
    want = whole * step * np.asarray(kernel.scale)
    np.testing.assert_allclose(kernel.dot(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)
    program = jax.jit(kernel.dot).lower(jnp.asarray(x)).as_text()
    assert "tensor<5x48xi32>" in program  # a product of whole numbers, not of rounded floats


@pytest.mark.parametrize("outputs", [48, 47])
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128)])
def test_four_bits_are_multiplied_as_their_numbers(shape, outputs):
    """Against float64; an odd number of columns leaves one without another in its byte."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32)
    w = rng.normal(size=(128, outputs)).astype(np.float32)
    kernel = quantized.quantize(jnp.asarray(w), quantized.SCHEMES["int4"])
    scale = np.repeat(np.asarray(kernel.scale, float), 64, axis=0)
    want = x.astype(float) @ (np.asarray(kernel.values).astype(float) * scale)
    np.testing.assert_allclose(jax.jit(kernel.dot)(x), want, rtol=2e-5, atol=2e-5)
    got = jax.grad(lambda x: kernel.dot(x).sum())(jnp.asarray(x))
    want = np.broadcast_to((np.asarray(kernel.values).astype(float) * scale).sum(1), shape)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 converts all layers first")
@pytest.mark.parametrize("name", SCHEMES)
def test_no_more_than_one_layer_is_in_floats_at_a_time(name):
    """Else a step of decoding writes the whole model in floats, and takes twice a float model's."""
    kernels = [
        quantized.quantize(jnp.full((256, 512), 0.1 * number), quantized.SCHEMES[name])
        for number in range(1, 9)
    ]

    def layers(x, kernels):
        for kernel in kernels:
            x = kernel.dot(x)[..., :256]
        return x

    program = jax.jit(layers).lower(jnp.ones((1, 256)), kernels).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 256 * 512 * 4


@pytest.mark.parametrize(
    "name", ["int4", "float8", *also("int8", "int8_dynamic", "float8_dynamic")]
)
def test_a_folder_keeps_every_number(model, name, tmp_path, one_device):
    small = quantize.quantized(model, name)
    folder = models.save(small, tmp_path / "q")
    again = models.load(folder, tokenizer=False, mesh=one_device)
    np.testing.assert_array_equal(again.logits(TOKENS), small.logits(TOKENS))
    assert again.generate([[1, 2, 3]], max_new_tokens=4) == small.generate(
        [[1, 2, 3]], max_new_tokens=4
    )
    mesh = make_mesh(data=2, fsdp=4)
    spread = models.load(folder, tokenizer=False, mesh=mesh)
    # Sums in another order move some inputs to the other side of a half.
    limit = 0.1 if name.endswith("dynamic") else 1e-5
    assert oracle.distance(spread.logits(TOKENS), small.logits(TOKENS)) < limit
    assert not spread.params["layers"]["mlp"]["up"]["kernel"].values.is_fully_replicated


def test_a_quantised_folder_is_small(model, tmp_path):
    size = lambda folder: (folder / "model.safetensors").stat().st_size
    whole = size(models.save(model, tmp_path / "f", dtype="bfloat16"))
    int8 = size(models.save(quantize.quantized(model, "int8", "bfloat16"), tmp_path / "8"))
    int4 = size(models.save(quantize.quantized(model, "int4", "bfloat16"), tmp_path / "4"))
    kernels = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192)
    assert abs((whole - int8) - kernels) < 0.05 * kernels
    assert abs((whole - int4) - 1.5 * kernels) < 0.08 * kernels


@pytest.mark.torch
def test_packing_equals_compressed_tensors():
    import torch

    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="needs compressed-tensors",
    )
    rng = np.random.default_rng(1)
    for bits in (4, 8):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        values = rng.integers(low, high, (6, 72)).astype(np.int8)
        theirs = helpers.pack_to_int32(torch.from_numpy(values), bits).numpy()
        np.testing.assert_array_equal(compressed.pack(values, bits), theirs)
        np.testing.assert_array_equal(compressed.unpack(theirs, bits, 72), values)


@pytest.mark.torch
@pytest.mark.parametrize("name", (*SCHEMES, "exceptions"))
def test_transformers_reads_the_folder(model, name, tmp_path):
    import torch

    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    how = quantized.named("int4", EXCEPTIONS) if name == "exceptions" else name
    small = quantize.quantized(model, how)
    folder = models.save(small, tmp_path / "q")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="float32", local_files_only=True
        ).eval()
        with torch.no_grad():
            want = theirs(torch.tensor(TOKENS)).logits.numpy()
    # Rounding of inputs may fall to the other side of a half here and there.
    limit = 0.1 if name.endswith("dynamic") else 3e-5
    assert oracle.distance(small.logits(TOKENS), want) < limit


@pytest.mark.parametrize("name", SCHEMES)
def test_training_that_knows_multiplies_as_the_quantised_model(name):
    key, other = jax.random.split(jax.random.key(0))
    kernel, x = jax.random.normal(key, (128, 48)), jax.random.normal(other, (7, 128))
    scheme = quantized.SCHEMES[name]
    want = quantized.quantize(kernel, scheme).dot(x)
    got = quantized.AwareKernel(kernel, scheme).dot(x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert float(jnp.abs(got - x @ kernel).max()) > 1e-2


@pytest.mark.parametrize("name", ["int8", "int4", "float8"])
def test_training_that_knows_computes_the_quantised_model(model, name):
    apply = lambda params: decoder.logits(
        decoder.apply(model.config, params, jnp.asarray(TOKENS), compute_dtype="float32")
    )
    aware = apply(quantize.aware(model.params, quantized.named(name)))
    want = quantize.quantized(model, name).logits(TOKENS)
    assert oracle.distance(aware, want) < 1e-4


def test_gradients_go_straight_through(model):
    """Where weights alone are rounded, they are those of the rounded model, at its weights."""
    apply = lambda params: jnp.sum(
        jnp.sin(
            decoder.apply(model.config, params, jnp.asarray(TOKENS), compute_dtype="float32").hidden
        )
    )
    ours = jax.grad(lambda params: apply(quantize.aware(params, quantized.named("int8"))))(
        model.params
    )
    rounded = quantize.dequantized(quantize.quantized(model, "int8")).params
    want = jax.grad(apply)(rounded)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        limit = 2e-4 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, atol=limit)


def test_bad_input_is_told(model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="must be one of int8, int4, int8_dynamic, float8"):
        quantize.quantized(model, "int3")
    small = quantize.quantized(model, "int8")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize.quantized(small, "int4")
    odd = models.random(models.DecoderConfig("llama", 61, 48, 40, 1, 2, 2, 24))
    with pytest.raises(
        ConfigError, match="groups of 64 inputs do not divide the 48 inputs of query"
    ):
        quantize.quantized(odd, "int4")

    def refuse(self, x):
        raise NotImplementedError("no such unit")

    monkeypatch.setattr(quantized.QuantizedKernel, "dot", refuse)
    with pytest.raises(ConfigError, match="cpu cannot run it .no such unit"):
        quantize.check_backend(quantized.named("int8_dynamic"))
    monkeypatch.undo()
    folder = models.save(small, tmp_path / "q")
    (folder / sums.FILE).unlink()
    raw = json.loads((folder / "config.json").read_text())
    for key, value in (("quant_method", "gptq"), ("format", "marlin-24"), ("config_groups", {})):
        changed = raw | {"quantization_config": raw["quantization_config"] | {key: value}}
        (folder / "config.json").write_text(json.dumps(changed))
        other = (
            "quantization_config: {" if key == "quant_method" else "only compressed-tensors with"
        )
        with pytest.raises(ModelError, match=other):
            models.load(folder)
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="use the unquantised model"):
        models.load(folder)


def test_float8_is_rounded_as_ml_dtypes_rounds(model):
    """Exact: the largest of a column becomes 448, and ties go to the even number."""
    kernel = np.asarray(model.params["layers"]["mlp"]["down"]["kernel"])
    found = quantize.quantized(model, "float8").params["layers"]["mlp"]["down"]["kernel"]
    scale = np.abs(kernel).max(1, keepdims=True) / np.float32(448)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    want = (kernel / np.asarray(found.scale)).astype(ml_dtypes.float8_e4m3fn)
    assert found.values.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(found.values).view(np.uint8), want.view(np.uint8))
    assert np.abs(want.astype(float)).max() == 448


def test_dynamic_float8_multiplies_rounded_inputs():
    """Against float64 products of numbers that ml_dtypes rounded."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 64)).astype(np.float32), rng.normal(size=(64, 48)).astype(np.float32)
    kernel = quantized.quantize(jnp.asarray(w), quantized.SCHEMES["float8_dynamic"])
    step = np.abs(x).max(1, keepdims=True) / np.float32(448)
    rounded = (x / step).astype(ml_dtypes.float8_e4m3fn).astype(float)
    want = rounded @ np.asarray(kernel.values).astype(float) * step * np.asarray(kernel.scale)
    np.testing.assert_allclose(kernel.dot(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)
    program = jax.jit(kernel.dot).lower(jnp.asarray(x)).as_text()
    assert "f8E4M3FN>, tensor<64x48xf8E4M3FN>" in program  # a product of such numbers


EXCEPTIONS = ("attention.k*=none", "mlp.down=int4", "mlp.*=int8")


def test_exceptions_are_found_by_name_and_written_as_others_read_them(model, tmp_path, one_device):
    """The first pattern that matches holds; the folder's words are compressed-tensors' own."""
    wanted = quantized.named("int4", EXCEPTIONS)
    small = quantize.quantized(model, wanted)
    flat = {
        quantized.in_layer(name): functools.reduce(
            lambda node, key: node[key], name.split("."), small.params
        )
        for name in quantized.projections(model.config)
    }
    bits = {name: leaf.scheme.bits if is_kernel(leaf) else None for name, leaf in flat.items()}
    attention = {"attention.query": 4, "attention.key": None, "attention.value": 4}
    mlp = {"mlp.gate": 8, "mlp.up": 8, "mlp.down": 4}
    assert bits == attention | {"attention.out": 4} | mlp
    np.testing.assert_array_equal(
        flat["attention.key"], model.params["layers"]["attention"]["key"]["kernel"]
    )
    folder = models.save(small, tmp_path / "q")
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert raw["ignore"] == ["lm_head", r"re:.*self_attn\.k_proj$"]
    assert [group["targets"] for group in raw["config_groups"].values()] == [
        [r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$"],
        ["Linear"],
    ]
    again = models.load(folder, tokenizer=False, mesh=one_device)
    np.testing.assert_array_equal(again.logits(TOKENS), small.logits(TOKENS))
    aware = decoder.apply(
        model.config,
        quantize.aware(model.params, wanted),
        jnp.asarray(TOKENS),
        compute_dtype="float32",
    )
    assert oracle.distance(decoder.logits(aware), small.logits(TOKENS)) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore": ["re:(.*)*x"]}, "only compressed-tensors with"),
        ({"ignore": ["re:.*.*.*x"]}, "only compressed-tensors with"),
        ({"ignore": ["re:*"]}, "only compressed-tensors with"),
        ({"ignore": [7]}, "only compressed-tensors with"),
        ({"ignore": ["model.layers.1.mlp.up_proj"]}, "layers differ in the scheme of mlp.up"),
    ],
)
def test_what_a_folder_says_of_its_modules_is_read_or_refused(model, tmp_path, change, message):
    folder = models.save(quantize.quantized(model, "int8"), tmp_path / "q")
    (folder / sums.FILE).unlink()
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=message):
        models.load(folder)


def test_a_gpu_without_such_numbers_is_named():
    class Ampere:
        platform, device_kind, compute_capability = "gpu", "NVIDIA A100", "8.0"

    with pytest.raises(ConfigError, match="A100 has compute capability 8.0, and float8 needs 8.9"):
        quantize.check_backend(quantized.named("float8"), device=Ampere())
    quantize.check_backend(quantized.named("int8"), device=Ampere())


def test_without_qwix_it_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdistill\[quant\]'"):
        quantize.quantized(model, "int8")
