"""What a training step costs, counted from the shapes of the network: parameters, FLOPs and bytes.

FLOPs are two for each multiplication with its addition in a matrix product; everything else is left out, as is usual.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from maehub.models import AutoencoderConfig, MaskedAutoencoder, Precision
from maehub.train.engine import LossOn

BACKWARD = 2
"""FLOPs of a backward pass for one of the forward pass: a product for the input's gradient, one for the weight's."""

_FP32 = 4  # bytes


class Parameters(NamedTuple):
    """Values of a network. The fixed position tables count as ``fixed`` alone."""

    encoder: int
    decoder: int
    fixed: int

    @property
    def trained(self) -> int:
        """Values that have a gradient."""
        return self.encoder + self.decoder


class Work(NamedTuple):
    """Which of the N patches of a view are computed where."""

    patches: int
    """N."""
    kept: int
    """K, seen by the encoder."""
    predicted: int
    """M, predicted by the decoder."""
    decoded: int
    """Patches that enter the decoder."""


class _Block(NamedTuple):
    """One transformer block: ``tokens`` enter, ``leaving`` of them leave."""

    tokens: int
    leaving: int
    width: int
    hidden: int
    heads: int


def count_parameters(network: AutoencoderConfig) -> Parameters:
    """Parameters of the encoder and of the decoder; nothing is allocated."""
    with torch.device("meta"):
        model = MaskedAutoencoder(network)
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    encoder = sum(count for name, count in trained.items() if name.startswith("encoder."))
    return Parameters(encoder, sum(trained.values()) - encoder, fixed)


def work_of(
    network: AutoencoderConfig, kept: int, *, share: float = 1.0, loss_on: LossOn = "hidden", corrupts: bool = False
) -> Work:
    """The patches of one view.

    Args:
        network: its encoder's native size is the size of the views.
        kept: K, patches that stay visible.
        share: of the hidden patches that are predicted; the decoder runs without the others.
        loss_on: with "all" every patch is predicted.
        corrupts: hidden patches are corrupted, and then none is left out of the decoder.
    """
    patches = math.prod(network.encoder.grid)
    predicted = patches if loss_on == "all" else max(1, round(share * (patches - kept)))
    return Work(patches, kept, predicted, patches if corrupts else min(patches, kept + predicted))


def forward_flops(network: AutoencoderConfig, work: Work) -> int:
    """FLOPs of one view's forward pass to the loss; training takes 1 + `BACKWARD` times as many."""
    return _flops(_products(network, work), _blocks(network, work))


def decoder_flops(network: AutoencoderConfig, work: Work) -> int:
    """The decoder's part of `forward_flops`."""
    return _flops(_products(network, work)[1:], _blocks(network, work)[network.encoder.depth :])


def activation_bytes(network: AutoencoderConfig, work: Work, precision: Precision, *, checkpoint: bool = False) -> int:
    """Peak memory that one more view in a micro-batch takes, in bytes.

    What the backward pass needs of every block, the picture and its target, and what lives beside them where the
    backward pass begins. Parameters, gradients and optimizer state are not in it.

    Args:
        network: its encoder's native size is the size of the views.
        precision: "bf16" is autocast: the residual stream and what a LayerNorm reads stay float32. Others count as
            float32.
        checkpoint: keep only the input of each block and compute the rest again.
    """
    half = 2 if precision == "bf16" else _FP32
    blocks = _blocks(network, work)
    if checkpoint:
        stored = sum(_FP32 * block.tokens * block.width for block in blocks)
        passing = [_block_bytes(block, half) for block in blocks]
    else:
        stored = sum(_block_bytes(block, half) for block in blocks)
        # what lives for a moment: gradients of both sides of a block's MLP and of the stream
        passing = [2 * half * block.leaving * block.hidden + 2 * _FP32 * block.tokens * block.width for block in blocks]
    for rows, inputs, _ in _products(network, work):
        stored += (half + _FP32) * rows * inputs  # what the product reads, and what made it
    pixels = math.prod(network.encoder.size) * network.encoder.channels
    stored += pixels + 2 * _FP32 * pixels  # uint8, normalised, cut into patches
    # prediction, the same in float32, target, difference, and the gradient of the prediction
    loss = (2 * half + 3 * _FP32) * work.predicted * network.prediction_width
    return stored + max([loss, *passing])


def fixed_bytes(parameters: Parameters, precision: Precision, *, shards: int = 1, largest_block: int = 0) -> int:
    """Memory of one process that does not depend on the batch, in bytes.

    Weights, gradients and the two moments of AdamW, float32; with "bf16" the copies that autocast makes of weights.

    Args:
        shards: processes that weights, gradients and moments are divided among (FSDP).
        largest_block: with ``shards`` the parameters of the largest block, of which two are gathered at a time.
    """
    held = 4 * _FP32 * parameters.trained + _FP32 * parameters.fixed
    half = 2 if precision == "bf16" else 0
    if shards == 1:
        return held + half * parameters.trained
    gathered = 2 * largest_block * (_FP32 + (half or _FP32))  # gradients, and weights to compute with
    return math.ceil(held / shards) + gathered


def checkpoint_bytes(parameters: Parameters) -> int:
    """One checkpoint on the disk: weights and the two moments of AdamW, float32."""
    return 3 * _FP32 * parameters.trained + _FP32 * parameters.fixed


def block_parameters(network: AutoencoderConfig) -> int:
    """Parameters of the largest transformer block."""
    encoder = network.encoder
    widths = [encoder.width] * bool(encoder.depth) + [network.decoder_width] * bool(network.decoder_depth)
    sizes = [4 * w * w + 2 * w * int(w * encoder.mlp_ratio) + 9 * w + int(w * encoder.mlp_ratio) for w in widths]
    return max(sizes, default=0)


def _blocks(network: AutoencoderConfig, work: Work) -> list[_Block]:
    """The encoder's blocks, then the decoder's."""
    encoder, width = network.encoder, network.decoder_width
    seen = 1 + (work.patches if network.mask_tokens == "encoder" else work.kept)
    hidden = int(encoder.width * encoder.mlp_ratio)
    blocks = [_Block(seen, seen, encoder.width, hidden, encoder.heads)] * encoder.depth
    if network.decoder_depth:
        tokens = 1 + work.decoded
        leaving = tokens if work.predicted == work.patches else work.predicted
        one = _Block(tokens, tokens, width, int(width * encoder.mlp_ratio), network.decoder_heads)
        blocks = [*blocks, *[one] * (network.decoder_depth - 1), one._replace(leaving=leaving)]
    return blocks


def _products(network: AutoencoderConfig, work: Work) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the linear layers outside the blocks: the patch embedding, then the decoder's
    embedding where there is a decoder, its head, and PCA's coefficients."""
    encoder = network.encoder
    inside = work.patches if network.mask_tokens == "encoder" else work.kept
    width = network.decoder_width if network.decoder_depth else encoder.width
    products = [(inside, network.patch_values, encoder.width)]
    if network.decoder_depth:
        products.append((1 + inside, encoder.width, width))
    products.append((work.predicted, width, network.prediction_width))
    if network.target == "pca":
        products.append((work.predicted, network.patch_values, network.prediction_width))
    return products


def _flops(products: Sequence[tuple[int, int, int]], blocks: Sequence[_Block]) -> int:
    """As torch's `FlopCounterMode` counts them on the network itself, in microseconds instead of seconds."""
    total = sum(2 * math.prod(product) for product in products)
    for tokens, leaving, width, hidden, _ in blocks:
        projections = (2 * tokens + 2 * leaving) * width * width  # keys and values; queries and output
        attention = 2 * leaving * tokens * width
        total += 2 * (projections + attention + 2 * leaving * width * hidden)
    return total


def _block_bytes(block: _Block, half: int) -> int:
    """What autograd keeps of one block for one view."""
    tokens, leaving, width, hidden, heads = block
    before = (_FP32 + half + 2 * half) * tokens * width  # input of norm1, its output, keys, values
    after = (half + half + _FP32 + half) * leaving * width  # queries, mixed, input of norm2, its output
    return before + after + 2 * half * leaving * hidden + _FP32 * leaving * heads
