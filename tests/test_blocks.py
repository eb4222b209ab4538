import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvae.blocks import MIRROR, Block, mirror, plan
from hvae.validate import InputError
from model import HVAE

stable = settings(deadline=None, max_examples=25, derandomize=True)
CHANNELS = st.integers(1, 8)


@st.composite
def skip_pair(draw, index, least):
    """skip-up, a body that keeps the size, skip-down; perhaps one more pair inside.

    No side of the map is shorter than least.
    """
    factor = draw(st.integers(1, min(3, least)))
    reduction = draw(st.sampled_from([("pool", factor), ("conv", draw(CHANNELS), factor)]))
    body = [("conv", draw(CHANNELS))]
    if draw(st.booleans()) and index % 10 < 2:
        body += draw(skip_pair(index + 1, least // factor))
    return [("skip-up", index), reduction, *body, ("upsample", factor), ("skip-down", index)]


@st.composite
def configs(draw, inner, size=None):
    """(config, channels, size): a valid block of one to five pieces, correct by construction."""
    size = size or (draw(st.integers(5, 40)), draw(st.integers(5, 40)))
    least = min(size)
    kinds = ["conv", "conv-bn", "conv stride", "conv-bn stride", "pool", "res"]
    kinds += ["convt", "convt-bn", "upsample", "skip"] if inner else []
    config = []
    for piece, kind in enumerate(draw(st.lists(st.sampled_from(kinds), max_size=5))):
        if kind == "upsample" and config.count(("upsample", 2)) > 1:
            continue  # the map is large enough
        if kind in ("conv", "conv-bn", "convt", "convt-bn", "res"):
            config.append((kind, draw(CHANNELS)))
        elif kind.endswith("stride"):
            stride = draw(st.integers(1, min(3, least)))
            config.append((kind.removesuffix(" stride"), draw(CHANNELS), stride))
            least = -(-least // stride)
        elif kind == "skip":
            config += draw(skip_pair(10 * piece, least))
        else:
            factor = draw(st.integers(1, min(3, least)))
            config.append((kind, factor))
            least = least // factor if kind == "pool" else least
    if not config or draw(st.booleans()):
        config.append(("dense", draw(CHANNELS)))
    return config, draw(CHANNELS), size


def plan_of(case, inner):
    return plan(*case, "inner_config[0]" if inner else "outer_config")


outer_plan = configs(inner=False).map(lambda case: plan_of(case, False))
inner_plan = configs(inner=True).map(lambda case: plan_of(case, True))
any_plan = st.one_of(outer_plan, inner_plan)


def run(layers, x):
    """The block's output; checks every layer's shape on the way."""
    block, seen = Block(layers), []
    for module in block.layers:
        module.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape[1:])))
    out = block(x)
    assert seen == [(layer.c_out, *layer.size_out) for layer in layers]
    return out


def sizes(config, size, channels=1):
    return [layer.size_out for layer in plan(config, channels, size, "inner_config[0]")]


# ---------------------------------------------------------------------------- plan, mirror, Block


@stable
@given(any_plan)
def test_plan_is_a_chain(layers):
    for a, b in itertools.pairwise(layers):
        assert (a.c_out, a.size_out) == (b.c_in, b.size_in)


@stable
@given(any_plan)
def test_block_yields_its_plans_shapes(layers):
    run(layers, torch.rand(2, layers[0].c_in, *layers[0].size_in))


@stable
@given(any_plan)
def test_mirror_reverses_kinds_and_swaps_shapes(layers):
    back = mirror(layers)
    assert [layer.kind for layer in back] == [MIRROR[layer.kind] for layer in reversed(layers)]
    for there, here in zip(reversed(layers), back, strict=True):
        assert (here.c_in, here.size_in) == (there.c_out, there.size_out)
        assert (here.c_out, here.size_out) == (there.c_in, there.size_in)
        assert (here.bn, here.arg) == (there.bn, there.arg)


@stable
@given(any_plan)
def test_mirror_block_restores_the_inputs_shape(layers):
    x = torch.rand(2, layers[0].c_in, *layers[0].size_in)
    assert run(mirror(layers), run(layers, x)).shape == x.shape


@stable
@given(any_plan)
def test_mirror_twice_is_the_plan(layers):
    assert mirror(mirror(layers)) == layers


@stable
@given(inner_plan)
def test_upsample_never_shrinks_and_pool_never_grows(layers):
    for layer in layers:
        if layer.kind == "upsample":
            assert all(b >= a for a, b in zip(layer.size_in, layer.size_out, strict=True))
        if layer.kind == "pool":
            assert all(b <= a for a, b in zip(layer.size_in, layer.size_out, strict=True))


def test_upsample_after_an_unrelated_upsample_does_not_shrink():
    """pool 4, upsample 6 is no round trip; a later upsample 4 must not go 'back' from 18 to 15."""
    before, after = sizes([("pool", 4), ("upsample", 6), ("upsample", 4)], (15, 15))[1:]
    assert before == (18, 18)
    assert after[0] >= 18


@pytest.mark.parametrize(
    "config, size, expected",
    [
        ([("pool", 2), ("upsample", 2)], (15, 9), [(7, 4), (15, 9)]),
        ([("pool", 4), ("upsample", 2), ("upsample", 2)], (15, 30), [(3, 7), (6, 14), (15, 30)]),
        ([("pool", 2), ("pool", 3), ("upsample", 6)], (29, 17), [(14, 8), (4, 2), (29, 17)]),
        ([("conv", 2, 2), ("upsample", 2)], (15, 8), [(8, 4), (15, 8)]),
        ([("conv", 2, 3), ("upsample", 3)], (16, 7), [(6, 3), (16, 7)]),
        ([("upsample", 3)], (5, 7), [(15, 21)]),  # undoes nothing, so it multiplies
        ([("pool", 2), ("upsample", 4)], (15, 9), [(7, 4), (30, 18)]),
    ],
)
def test_upsample_restores_the_size_before_the_reductions(config, size, expected):
    assert sizes(config, size) == expected


@pytest.mark.parametrize("size", [(15, 9), (31, 77), (5, 5), (12, 62)])
def test_u_net_of_any_size(size):
    config = [("conv-bn", 3), ("skip-up", 0), ("pool", 2), ("conv", 4), ("skip-up", 1), ("pool", 2)]
    config += [("conv", 5), ("upsample", 2), ("skip-down", 1), ("conv", 3), ("upsample", 2)]
    config += [("skip-down", 0), ("conv", 1)]
    layers = plan(config, 2, size, "inner_config[0]")
    downs = [layer for layer in layers if layer.kind == "skip-down"]
    down = {layer.arg: (layer.c_in, layer.c_skip, layer.size_in) for layer in downs}
    assert down == {0: (3, 3, size), 1: (5, 4, (size[0] // 2, size[1] // 2))}
    assert run(layers, torch.rand(2, 2, *size)).shape == (2, 1, *size)


def test_skip_down_reads_the_map_that_skip_up_saw():
    layers = plan([("skip-up", 7), ("conv", 3), ("skip-down", 7)], 3, (6, 5), "inner_config[0]")
    block = Block(layers)
    with torch.no_grad():
        block.layers[2].weight.zero_()
        block.layers[2].bias.zero_()
        # passes on the remembered half alone
        block.layers[2].weight[:, 3:] = torch.eye(3)[:, :, None, None]
    x = torch.rand(2, 3, 6, 5)
    torch.testing.assert_close(block(x), x)


def test_dense_after_dense_is_a_vector_to_vector_block():
    layers = plan([("dense", 5)], 3, (), "inner_config[0]")
    x = torch.rand(2, 3)
    assert run(layers, x).shape == (2, 5)
    assert run(mirror(layers), torch.rand(2, 5)).shape == x.shape


@pytest.mark.parametrize(
    "item, convolution, bn",
    [
        (("conv", 4), torch.nn.Conv2d, False),
        (("conv-bn", 4), torch.nn.Conv2d, True),
        (("convt", 4), torch.nn.ConvTranspose2d, False),
        (("convt-bn", 4), torch.nn.ConvTranspose2d, True),
    ],
)
def test_convolutions_are_3x3_with_optional_batch_normalisation(item, convolution, bn):
    layers = list(Block(plan([item], 2, (5, 5), "inner_config[0]")).layers[0])
    assert isinstance(layers[0], convolution) and layers[0].kernel_size == (3, 3)
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in layers) == bn
    assert (layers[0].bias is None) == bn


def test_pool_takes_the_maximum_and_upsample_repeats():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out = Block(plan([("pool", 2), ("upsample", 2)], 1, (4, 4), "inner_config[0]"))(x)
    assert out[0, 0].tolist() == [[5, 5, 7, 7], [5, 5, 7, 7], [13, 13, 15, 15], [13, 13, 15, 15]]


# ---------------------------------------------------------------------------- malformed configs


MALFORMED_ITEMS = [  # errors wherever they stand
    (("convolution", 4), "unknown"),
    (("Conv", 4), "unknown"),
    (("", 4), "unknown"),
    (("conv",), "one or two numbers"),
    (("conv", 4, 2, 1), "one or two numbers"),
    (("pool", 2, 2), "one number"),
    (("pool",), "one number"),
    (("res", 4, 2), "one number"),
    (("dense", 4, 2), "one number"),
    (("conv", True), "whole number"),
    (("conv", 4.0), "whole number"),
    (("conv", "4"), "whole number"),
    (("conv", None), "whole number"),
    (("conv", [4]), "whole number"),
    (("conv", 4, 1.5), "whole number"),
    (("conv", 4, None), "whole number"),
    (("conv", 0), ">= 1"),
    (("conv", -4), ">= 1"),
    (("conv", 4, 0), ">= 1"),
    (("conv-bn", 4, -1), ">= 1"),
    (("pool", 0), ">= 1"),
    (("res", -1), ">= 1"),
    (("dense", 0), ">= 1"),
    (("pool", 11), "larger than its"),
    (("conv", 4, 13), "the stride is larger than its 10x12 map"),
    (("conv-bn", 4, 10**12), "the stride is larger than its 10x12 map"),
    (("conv", 10**12), "more than 268,435,456 weights"),
    (("conv-bn", 10**8), "more than 268,435,456 weights"),
    (("res", 10**5), "more than 268,435,456 weights"),
    (("dense", 10**7), "more than 268,435,456 weights"),
    ((), "expected a tuple"),
    ((4, "conv"), "expected a tuple"),
    ("conv", "expected a tuple"),
    (4, "expected a tuple"),
    (None, "expected a tuple"),
    ({"conv": 4}, "expected a tuple"),
]
UP, DOWN = ("skip-up", 0), ("skip-down", 0)
INNER_ONLY = [("upsample", 2), ("convt", 4), ("convt-bn", 4), UP, DOWN]
MALFORMED_INNER = [  # (inner_config, location, fragment)
    ([[("skip-down", 3)]], "inner_config[0][0]", "no 'skip-up' with index 3 before it"),
    ([[("conv", 4)], [("res", 4), DOWN]], "inner_config[1][1]", "no 'skip-up' with index 0 before"),
    ([[("skip-up", 3), ("conv", 4)], [("skip-down", 3)]], "inner_config[0]", "3"),  # another block
    ([[UP, DOWN, DOWN]], "inner_config[0][2]", "no unused 'skip-up' with index 0"),
    ([[UP, ("conv", 4), UP, DOWN]], "inner_config[0][2]", "second 'skip-up'"),
    ([[UP, DOWN, UP, DOWN]], "inner_config[0][2]", "second 'skip-up'"),
    (
        [[("conv", 4)], [("skip-up", 2)]],
        "inner_config[1]",
        "'skip-up' with index 2 has no 'skip-down'",
    ),
    ([[UP, ("pool", 2), DOWN]], "inner_config[0][2]", "remembered 10x12"),
    ([[UP, ("upsample", 2), DOWN]], "inner_config[0][2]", "remembered 10x12"),
    ([[UP, ("pool", 3), ("upsample", 2), DOWN]], "inner_config[0][3]", "remembered 10x12"),
    ([[UP, ("dense", 3), DOWN]], "inner_config[0][2]", "dense"),
    ([[("skip-up", -1)]], "inner_config[0][0]", ">= 0"),
    ([[("skip-up", 0.0)]], "inner_config[0][0]", "whole number"),
    ([[("upsample", 0)]], "inner_config[0][0]", ">= 1"),
    ([[("upsample", 10**6)]], "inner_config[0][0]", "more than 16,777,216 pixels"),
    ([[("convt", 10**12)]], "inner_config[0][0]", "more than 268,435,456 weights"),
    ([[("dense", 10**5)], [("dense", 10**5)]], "inner_config[1][0]", "weights"),
    ([[("convt", 4, 2)]], "inner_config[0][0]", "one number"),
    ([[("dense", 3), ("conv", 4)]], "inner_config[0][1]", "last"),
    ([[("dense", 3), ("dense", 3)]], "inner_config[0][1]", "last"),
    ([[("dense", 3)], [("conv", 4)]], "inner_config[1][0]", "vector"),
    ([[("dense", 3)], [UP, DOWN]], "inner_config[1][0]", "vector"),
    ([[("conv", 4, 4)], [("pool", 4)]], "inner_config[1][0]", "larger than its 3x3 map"),
    ([[]], "inner_config[0]", "non-empty"),
    ([[("conv", 4)], []], "inner_config[1]", "non-empty"),
    ([None], "inner_config[0]", "non-empty list"),
    (["conv"], "inner_config[0]", "non-empty list"),
    ([5], "inner_config[0]", "non-empty list"),
    ([("conv", 4)], "inner_config[0][0]", "expected a tuple"),  # the list of the block is missing
    (None, "inner_config", "list"),
    ("conv", "inner_config", "list"),
    ({0: [("conv", 4)]}, "inner_config", "list"),
    (5, "inner_config", "list"),
]
MALFORMED_OUTER = [
    ([], "outer_config", "non-empty"),
    (None, "outer_config", "list"),
    ("conv", "outer_config", "list"),
    (5, "outer_config", "list"),
    ({"conv": 4}, "outer_config", "list"),
    ([("dense", 4), ("conv", 4)], "outer_config[1]", "last"),
    ([("conv", 4), ("dense", 4), ("pool", 2)], "outer_config[2]", "last"),
    ([("pool", 4), ("pool", 3)], "outer_config[1]", "larger than its 2x3 map"),
]


def error_of(outer, inner):
    with pytest.raises(InputError) as error:
        HVAE(outer, inner, input_size=(10, 12), input_channels=1, text_length=None)
    return str(error.value)


@pytest.mark.parametrize(
    "outer, inner, place",
    [
        ([("conv", 4)], [], "outer_config[1]"),
        ([("conv", 4)], [[("conv", 4)], [("res", 4)]], "inner_config[1][1]"),
    ],
)
@pytest.mark.parametrize("item, fragment", MALFORMED_ITEMS)
def test_malformed_item(item, fragment, outer, inner, place):
    if inner:
        inner = [*inner[:-1], [*inner[-1], item]]
    else:
        outer = [*outer, item]
    message = error_of(outer, inner)
    assert message.startswith(f"{place} ") and fragment in message and "\n" not in message


@pytest.mark.parametrize("item", INNER_ONLY)
def test_inner_tuples_are_not_allowed_in_outer(item):
    message = error_of([("conv", 4), item], [])
    assert message.startswith(f"outer_config[1] {item!r}: ")
    assert "not allowed in outer_config" in message


@pytest.mark.parametrize(
    "outer, inner, place, fragment",
    [([("conv", 4)], *case) for case in MALFORMED_INNER]
    + [(outer, [], *case) for outer, *case in MALFORMED_OUTER],
)
def test_malformed_config(outer, inner, place, fragment):
    message = error_of(outer, inner)
    assert message.split(":")[0].split(" ")[0] == place and fragment in message


def test_message_of_the_readme():
    message = error_of([("conv", 4)], [[("conv", 4)], [("conv", 4)] * 4 + [("skip-down", 3)]])
    assert message == "inner_config[1][4] ('skip-down', 3): no 'skip-up' with index 3 before it"


def test_lists_do_for_tuples():
    HVAE([["conv", 4]], ((["res", 4],),), [10, 12], 1, [1, 2], text_length=None)


def test_a_block_in_words():
    config = [("conv-bn", 8, 2), ("pool", 2), ("res", 4), ("skip-up", 1), ("skip-down", 1)]
    config += [("upsample", 4), ("convt", 3), ("dense", 5)]
    assert str(Block(plan(config, 1, (12, 10), "inner_config[0]"))) == (
        "conv-bn 8/2, pool 2, res 4, skip-up 1, skip-down 1, upsample 4, convt 3, dense 5"
    )
