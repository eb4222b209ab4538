"""Weights for a model of other images and texts, from a model of the same blocks.

Most weights fit as they are. These change shape, so that each layer computes about what it did:

    first convolution     colours to grey: summed; grey to colours: shared evenly
    context               colours to grey: the first channel's, see fitted_context()
    dense and its mirror  interpolated to the new map, as are a first map h and the texts' places
    embeddings            symbol by symbol; a letter may be known in the other case
    texts                 the places that both lengths have
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.blocks import Block, Layer, Size


def adapted(model: nn.Module, **changes) -> tuple[nn.Module, list[str]]:
    """The same weights in an HVAE with other arguments, and the names of those that are untrained.

    It serves images of another size or grey ones, other texts, and windows for p(x|z) or the
    priors. A Gaussian's mean becomes z's guess.
    """
    config = {**model.config, **changes}
    if config["context"] and config["likelihood"] == "gaussian":
        config.update(likelihood="logistic", mixtures=changes.get("mixtures", 6))
    changed = type(model)(**config)
    fits = fitted_weights(model, changed)
    changed.load_state_dict({**changed.state_dict(), **fits})
    c = changed.input_shape[0]
    if model.config["likelihood"] == "gaussian" and changed.context and c == model.input_shape[0]:
        with torch.no_grad():
            changed.to_image.weight[:, :c] = model.to_image.weight[:, :c]
            changed.to_image.bias[:c] = model.to_image.bias[:c]
    changed.provenance = model.provenance
    return changed, [name for name in changed.state_dict() if name not in fits]


def fitted_weights(old: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """The weights of an HVAE that fit a new one, by name; those that do not are left out."""
    before, after = old.state_dict(), new.state_dict()
    weights = {name: w for name, w in before.items() if name in after}
    for name, w in weights.items():
        of_text = any(part.startswith("text") for part in name.split("."))
        if name.endswith("embedding.weight"):
            weights[name] = fitted_symbols(w, after[name], old.charset, new.charset)
        elif name == "h_top" and w.dim() == 4:
            weights[name] = stretched(w, after[name].shape[2:])
        elif of_text and old.text_length != new.text_length:
            weights[name] = fitted_places(name, w, after[name])
        elif of_text and w.dim() == 3:  # where a symbol is
            weights[name] = stretched(w, after[name].shape[1:])
    weights.update(fitted_blocks(old, new))
    if old.input_shape[0] != new.input_shape[0]:  # a palette's levels are other ones
        weights = {name: w for name, w in weights.items() if "context.palette" not in name}
        if new.input_shape[0] == 1 and old.context is not None and not old.context.binary:
            weights.update(fitted_context(old.context))
    return {
        name: w for name, w in weights.items() if name in after and w.shape == after[name].shape
    }


def fitted_blocks(old: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """Of the first convolution, and of layers between maps and vectors."""
    weights = {}
    blocks = {name: block for name, block in old.named_modules() if isinstance(block, Block)}
    for name, block in blocks.items():
        for k, layers in enumerate(zip(block.plan, new.get_submodule(name).plan, strict=True)):
            if layers[0].kind in ("dense", "undense"):
                fit = fitted_dense if layers[0].kind == "dense" else fitted_undense
                named = fit(block.layers[k].state_dict(), *layers)
                weights.update({f"{name}.layers.{k}.{n}": w for n, w in named.items()})
    name = "inference.0.layers.0.0.weight"
    colours, new_colours = old.input_shape[0], new.input_shape[0]
    if old.inference[0].plan[0].kind == "conv" and colours != new_colours:
        grey = old.state_dict()[name].sum(1, keepdim=True)
        weights[name] = grey.expand(-1, new_colours, -1, -1) / new_colours
    return weights


def fitted_context(old: nn.Module) -> dict[str, Tensor]:
    """Weights of a ContextNetwork for grey images, from one for colours.

    For grey images they predict what it predicts for the first of equal channels. So weights for
    the channels of a pixel, or of a palette's colour, are summed.
    """
    C, weights = old.channels, {}
    summed = lambda w: w.unflatten(1, (-1, C)).sum(2)
    weights["from_window.weight"] = summed(old.from_window.weight)
    for colour in range(3):
        hidden, out = old.palette.hidden[C * colour], old.palette.out[C * colour]
        of_z, of_earlier = hidden.weight.split([3 * old.features, C * colour], 1)
        weights[f"palette.hidden.{colour}.weight"] = torch.cat([of_z, summed(of_earlier)], 1)
        weights[f"palette.hidden.{colour}.bias"] = hidden.bias
        weights.update({f"palette.out.{colour}.{n}": w for n, w in out.state_dict().items()})
    return {f"context.{name}": w.detach() for name, w in weights.items()}


def fitted_dense(named: dict[str, Tensor], before: Layer, after: Layer) -> dict[str, Tensor]:
    """A map of another size is summed over as many positions as it has."""
    weight = named["1.weight"].unflatten(1, (before.c_in, *before.size_in))
    share = math.prod(before.size_in) / math.prod(after.size_in)
    return {**named, "1.weight": share * stretched(weight, after.size_in).flatten(1)}


def fitted_undense(named: dict[str, Tensor], before: Layer, after: Layer) -> dict[str, Tensor]:
    weight = named["0.weight"].T.unflatten(1, (before.c_out, *before.size_out))
    bias = named["0.bias"].view(1, before.c_out, *before.size_out)
    return {
        "0.weight": stretched(weight, after.size_out).flatten(1).T,
        "0.bias": stretched(bias, after.size_out).flatten(),
    }


def fitted_symbols(before: Tensor, after: Tensor, charset: str, new_charset: str) -> Tensor:
    """The rows of the symbols that both charsets have, if only in the other case."""
    fitted = after.clone()
    for i, symbol in enumerate(new_charset):
        known = symbol if symbol in charset else symbol.swapcase()
        if known in charset:
            fitted[i] = before[charset.index(known)]
    return fitted


def fitted_places(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Of a TextInput for texts of another length: the places that both have, and "none".

    Where the places are, the bias, does not fit: they start evenly spread.
    """
    fitted = after.clone()
    if name.endswith("flat.weight"):
        n = min(before.shape[1], after.shape[1])
        fitted[:, :n] = before[:, :n]
    elif ".which." in name:
        n = min(len(before), len(after)) - 1
        fitted[:n], fitted[-1] = before[:n], before[-1]
    else:
        return before
    return fitted


def stretched(maps: Tensor, size: Size) -> Tensor:
    """Maps (..., H, W) of another size, by interpolation."""
    if not size or tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear").view(*maps.shape[:-2], *size)
