"""Parameter shapes of real networks, written out from their papers and original code.

No framework that builds these models is needed to time an optimizer on them. Order and shapes are
those of the models' own ``parameters()``; the totals are the published ones. `depth` is the number
of transformer blocks.
"""

from __future__ import annotations

Shape = tuple[int, ...]


def gpt2(depth: int = 12) -> tuple[Shape, ...]:
    """GPT-2 124M in the order of the original model (Radford et al., 2019).

    The output projection shares the token embedding's tensor, so it is not listed again.
    """
    width, vocabulary, context = 768, 50257, 1024
    norm: list[Shape] = [(width,), (width,)]
    block = [
        *norm, (width, 3 * width), (3 * width,), (width, width), (width,),  # attention
        *norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return ((vocabulary, width), (context, width), *(block * depth), *norm)


def resnet50() -> tuple[Shape, ...]:
    """ResNet-50 for ImageNet (He et al., 2015): every convolution is followed by a batch norm."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:  # the shortcut changes its size
                convolutions.append((outputs, inputs, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            inputs = outputs
    return (*shapes, (1000, 2048), (1000,))


def bert(depth: int = 12) -> tuple[Shape, ...]:
    """BERT-base (Devlin et al., 2018), uncased, with its pooler and without a head."""
    width, vocabulary, positions, kinds = 768, 30522, 512, 2
    norm: list[Shape] = [(width,), (width,)]
    dense: list[Shape] = [(width, width), (width,)]
    block = [
        *(dense * 4), *norm,  # query, key, value, output
        (4 * width, width), (4 * width,), (width, 4 * width), (width,), *norm,
    ]  # fmt: skip
    embeddings: list[Shape] = [(vocabulary, width), (positions, width), (kinds, width), *norm]
    return (*embeddings, *(block * depth), *dense)


def vit(depth: int = 24) -> tuple[Shape, ...]:
    """ViT-L/16 for 224 x 224 images and ImageNet's classes (Dosovitskiy et al., 2020)."""
    width, patch = 1024, 16
    tokens = (224 // patch) ** 2 + 1
    norm: list[Shape] = [(width,), (width,)]
    block = [
        *norm, (3 * width, width), (3 * width,), (width, width), (width,),
        *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    stem: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    return (*stem, *(block * depth), *norm, (1000, width), (1000,))


def llama3(depth: int = 32) -> tuple[Shape, ...]:
    """Llama 3 8B (Grattafiori et al., 2024): grouped queries, no biases, an output of its own."""
    width, vocabulary, key_heads, head, hidden = 4096, 128_256, 8, 128, 14_336
    grouped = key_heads * head
    block: list[Shape] = [
        (width, width), (grouped, width), (grouped, width), (width, width),  # q, k, v, o
        (hidden, width), (hidden, width), (width, hidden),  # gate, up, down
        (width,), (width,),  # the two norms
    ]  # fmt: skip
    return ((vocabulary, width), *(block * depth), (width,), (vocabulary, width))
