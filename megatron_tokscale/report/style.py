"""Colours, the same thing in the same colour everywhere, and the page's style sheet.

The datasets' colours are those of Okabe and Ito (2008), which most colour-blind people tell apart.
"""

MEASURED = "#111111"
NULL = "#8a8a8a"
SPECTRUM_FILL = "#dcdcdc"
RECONSTRUCTIONS = {
    "full": ("#7b3294", "-"),
    "kernel": ("#b8730a", "--"),
    "spectrum": ("#2a8c8c", ":"),
}
ALIGNMENTS = {"absolute": (MEASURED, "o"), "by loss": ("#0072b2", "s")}
# Weight over base share: from which ratio on, its name, and its shade, blue over grey to orange.
RATIOS = (
    (0.0, "below ¼ of base", "#08519c"),
    (0.25, "¼ to ½", "#4a90c8"),
    (0.5, "½ to 0.8", "#a9cfe6"),
    (0.8, "0.8 to 1.25", "#e4e4e4"),
    (1.25, "1.25 to 2", "#fdd0a2"),
    (2.0, "2 to 4", "#f28e3c"),
    (4.0, "4 and more", "#a63603"),
)
_DATASETS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))


def dataset_colour(index: int) -> str:
    """The colour of the probe set's dataset `index`; they come round after six."""
    return _DATASETS[index % len(_DATASETS)]


def dataset_line(index: int) -> str | tuple[int, tuple[float, ...]]:
    """The dashes of dataset `index`: solid for the first six, then others."""
    return _DASHES[index // len(_DATASETS) % len(_DASHES)]


CSS = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5a5a5a; --line: #dedede; --tint: #f6f6f4;
  --mark: #ffe08a; }
* { box-sizing: border-box; }
html { background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
body { max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption, .facts { color: var(--soft); }
.warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: #fdf3ec; }
.verdict { font-size: 1.1rem; border-left: 4px solid #111; padding: .3rem .8rem;
  background: var(--tint); }
nav ol { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: 1rem 0;
  list-style: none; font-size: .9rem; }
a { color: #00558c; }
a:focus-visible { outline: 2px solid #00558c; outline-offset: 2px; }
figure { margin: 1.2rem 0; }
figure svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; }
figcaption, caption { font-size: .875rem; text-align: left; }
caption { padding: 0 0 .35rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { min-width: 26rem; border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; border-bottom: 1px solid #999; vertical-align: bottom; }
tbody th { font-weight: 400; min-width: 9rem; }
.facts-of td, .words td, .words thead th { text-align: left; }
.dense th, .dense td { padding-left: .45rem; padding-right: .45rem; }
.dense tbody th { min-width: 7rem; }
td .interval { display: block; color: var(--soft); font-size: .8rem; white-space: nowrap; }
.outcome { font-weight: 600; white-space: nowrap; }
.outcome.passed { color: #00634a; }
.outcome.undefined, .outcome.undecided { color: var(--soft); }
.part { padding-left: 1.3rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-size: .9rem; color: var(--soft); }
.facts-of tbody th { color: var(--soft); white-space: nowrap; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: -.05rem; }
.bar { display: inline-block; min-width: 6.5rem; padding: 0 .25rem;
  background: linear-gradient(#d3e4f0, #d3e4f0) left / var(--share) 100% no-repeat; }
.token { display: grid; grid-template-columns: minmax(0, 1fr) 19rem; gap: .4rem 1.4rem;
  padding: .9rem 0; border-top: 1px solid var(--line); align-items: start; }
.token .text { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .5rem .7rem;
  background: var(--tint); border-radius: 4px; unicode-bidi: isolate; max-width: none; }
.token .text span { unicode-bidi: isolate; color: #444; }
.token mark { unicode-bidi: isolate; background: var(--mark); color: #000; font-weight: 600;
  padding: .05rem 0; border-radius: 2px; }
.facts { font-size: .85rem; margin: .45rem 0 0; font-variant-numeric: tabular-nums; }
.facts b { color: var(--ink); font-weight: 600; }
.token svg { width: 100%; height: auto; display: block; }
.token svg text { font: 9px system-ui, sans-serif; fill: #5a5a5a; }
.token svg .a { stroke: #bbb; fill: none; }
.token svg .p { stroke: #111; stroke-width: 2.6; stroke-linecap: round; fill: none; }
.token svg .m { stroke: #c0392b; stroke-width: 1.4; fill: none; }
.token svg .c { stroke: #c0392b; stroke-width: .8; stroke-dasharray: 2 2; fill: none; }
@media (max-width: 44rem) { .token { grid-template-columns: 1fr; } }
@media print { .token, figure, table { break-inside: avoid; } }
"""
