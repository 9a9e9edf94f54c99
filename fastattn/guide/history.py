"""The page "history" of the guide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastattn.console.terminal import Style, wrap
from fastattn.guide.page import Picture, Step, Table
from fastattn.guide.pictures import BLUE, GREEN, ORANGE, RED


@dataclass(frozen=True)
class Paper:
    """A paper, and in a few words what it brought."""

    year: int
    short: str
    authors: str
    title: str
    arxiv: str
    brought: str


STRANDS = {
    "Translation learns to look back": (
        Paper(2014, "encoder and decoder", "Cho, van Merriënboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio",
              "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
              "1406.1078", "One network reads a phrase into a vector, another writes from it."),
        Paper(2014, "sequence to sequence", "Sutskever, Vinyals, Le",
              "Sequence to sequence learning with neural networks", "1409.3215",
              "The same for whole sentences, with deep LSTMs: one vector for a sentence."),
        Paper(2014, "the bottleneck measured", "Cho, van Merriënboer, Bahdanau, Bengio",
              "On the properties of neural machine translation: encoder-decoder approaches",
              "1409.1259", "Translations get worse quickly as sentences get longer."),
        Paper(2014, "additive attention", "Bahdanau, Cho, Bengio",
              "Neural machine translation by jointly learning to align and translate",
              "1409.0473", "The decoder looks back at all words, with weights that it learns: attention."),
        Paper(2015, "attention to images", "Xu, Ba, Kiros, Cho, Courville, Salakhutdinov, Zemel, Bengio",
              "Show, attend and tell: neural image caption generation with visual attention",
              "1502.03044", "Captions that look at parts of a picture; soft against hard attention."),
        Paper(2015, "dot-product and local attention", "Luong, Pham, Manning",
              "Effective approaches to attention-based neural machine translation",
              "1508.04025", "Simpler scores, dot and general; windows that move along the source."),
    ),
    "Attention is enough": (
        Paper(2015, "memory read by attention", "Sukhbaatar, Szlam, Weston, Fergus", "End-to-end memory networks",
              "1503.08895", "Several rounds of soft lookup in a memory, with keys and values apart."),
        Paper(2016, "self-attention", "Cheng, Dong, Lapata", "Long short-term memory-networks for machine reading",
              "1601.06733", "A reader attends to what it has read of the same sentence."),
        Paper(2016, "decomposable attention", "Parikh, Täckström, Das, Uszkoreit",
              "A decomposable attention model for natural language inference",
              "1606.01933", "Two sentences aligned by attention alone, without recurrence."),
        Paper(2017, "the Transformer", "Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin",
              "Attention is all you need", "1706.03762",
              "Scaled dot products, many heads, and nothing else that mixes words."),
        Paper(2018, "BERT", "Devlin, Chang, Lee, Toutanova",
              "BERT: pre-training of deep bidirectional transformers for language understanding",
              "1810.04805", "An encoder, trained once on much text, serves many tasks. MiniLM is a small one."),
        Paper(2019, "sentence vectors", "Reimers, Gurevych",
              "Sentence-BERT: sentence embeddings using Siamese BERT-networks", "1908.10084",
              "BERT trained so that near vectors mean like sentences, as in the demo."),
        Paper(2020, "MiniLM", "Wang, Wei, Dong, Bao, Yang, Zhou",
              "MiniLM: deep self-attention distillation for task-agnostic compression of pre-trained transformers",
              "2002.10957", "A small model learns the attention of a large one."),
    ),
    "What heads do": (
        Paper(2019, "heads of BERT", "Clark, Khandelwal, Levy, Manning",
              "What does BERT look at? An analysis of BERT's attention", "1906.04341",
              "Heads for positions, for separators, for syntax: as on page 5."),
        Paper(2019, "not an explanation?", "Jain, Wallace", "Attention is not explanation", "1902.10186",
              "Weights that differ much can give the same output: caution when reading them."),
        Paper(2019, "or perhaps one", "Wiegreffe, Pinter", "Attention is not not explanation", "1908.04626",
              "It depends on what is asked of an explanation."),
        Paper(2023, "sinks", "Xiao, Tian, Chen, Han, Lewis", "Efficient streaming language models with attention sinks",
              "2309.17453", "The first tokens gather weight that has nowhere else to go."),
    ),
    "Faster and longer": (
        Paper(2018, "online softmax", "Milakov, Gimelshein", "Online normalizer calculation for softmax", "1805.02867",
              "Maximum and sum of a softmax in one pass."),
        Paper(2019, "shared keys", "Shazeer", "Fast transformer decoding: one write-head is all you need", "1911.02150",
              "All query heads share one head of keys and values."),
        Paper(2021, "rotary positions", "Su, Lu, Pan, Murtadha, Wen, Liu",
              "RoFormer: enhanced transformer with rotary position embedding", "2104.09864",
              "Queries and keys are turned by an angle that grows with the position."),
        Paper(2021, "no quadratic memory", "Rabe, Staats", "Self-attention does not need O(n²) memory", "2112.05682",
              "Attention in chunks of keys and queries, with exact results."),
        Paper(2022, "FlashAttention", "Dao, Fu, Ermon, Rudra, Ré",
              "FlashAttention: fast and memory-efficient exact attention with IO-awareness", "2205.14135",
              "Tiles that stay in fast memory, forward and backward."),
        Paper(2023, "grouped queries", "Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebrón, Sanghai",
              "GQA: training generalized multi-query transformer models from multi-head checkpoints", "2305.13245",
              "Groups of query heads share a head of keys and values."),
        Paper(2023, "FlashAttention-2", "Dao",
              "FlashAttention-2: faster attention with better parallelism and work partitioning",
              "2307.08691", "Fewer operations that are no products; work divided by queries."),
    ),
}  # fmt: skip


def steps() -> Iterator[Step]:
    """A time line, and the papers strand by strand."""
    yield (
        "Attention in the sense of this guide began in translation, in 2014, as the way out of the bottleneck of "
        "[page 1](bottleneck.md). In three years it became the whole network; since then it has mostly been made "
        "faster. Years are those of the first version on arXiv."
    )
    yield _picture()
    for strand, papers in STRANDS.items():
        yield f"## {strand}"
        yield Table(
            ["", "paper", "what it brought"],
            [
                [
                    str(paper.year),
                    f"{paper.authors}: *{paper.title}*, [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})",
                    paper.brought,
                ]
                for paper in sorted(papers, key=lambda paper: paper.arxiv)
            ],
            left=True,
        )
    yield (
        "Where to begin? With Bahdanau, Cho and Bengio, whose first three pages say why attention is needed; then "
        "Vaswani et al., section 3; then Rabe and Staats, whose algorithm fits on a page. What of all this is in "
        "fastattn, and how exactly it is defined, stands in [What the words mean](../semantics.md)."
    )


def _picture() -> Picture:
    def lines(style: Style) -> list[str]:
        drawn = []
        for year in sorted({paper.year for papers in STRANDS.values() for paper in papers}):
            names = ", ".join(paper.short for papers in STRANDS.values() for paper in papers if paper.year == year)
            first, *rest = wrap(names, style.width - 8)
            drawn += [f"  {style.bold(str(year))}  {first}", *(f"        {line}" for line in rest)]
        return drawn

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        height = 0.0
        for (strand, papers), colour in zip(STRANDS.items(), (BLUE, RED, GREEN, ORANGE), strict=True):
            axes.text(2013.0, height - 0.1, strand, fontsize=9, fontweight="bold", va="center")
            for paper in sorted(papers, key=lambda paper: paper.arxiv):
                height -= 1
                when = 2000 + int(paper.arxiv[:2]) + (int(paper.arxiv[2:4]) - 0.5) / 12
                axes.plot(when, height, "o", color=colour, markersize=5)
                axes.text(when + 0.15, height, paper.short, fontsize=8.5, va="center")
            height -= 1.6
        axes.set(xlim=(2012.9, 2026), ylim=(height + 0.8, 1))
        axes.set_xticks(range(2014, 2025, 2))
        axes.set_yticks([])
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["left", "right", "top"]].set_visible(False)

    return Picture(
        "history", "Ten years of attention, by the date of the first version on arXiv.", lines, draw, (7.5, 6.2)
    )
