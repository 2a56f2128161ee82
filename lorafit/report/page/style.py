"""How the page looks: one column, calm, light or dark as the system is; and the plots, in files, too."""

from __future__ import annotations

_SERIES = ("#0072b2", "#d55e00", "#00795c")
_SERIES_ON_DARK = ("#56b4e9", "#ee8b3c", "#2fc79c")
"""Blue, vermilion and green after Okabe and Ito (https://jfly.uni-koeln.de/color/), lighter on dark paper: they stay
apart for colour-blind readers, and each line is named beside its end."""


def _plot_rules(ink: str, *, muted: str, line: str, series: tuple[str, ...]) -> str:
    rules = [
        f"text{{font-size:12px}}.tick,.axis-name{{fill:{muted}}}.name{{font-weight:600}}",
        f".value{{fill:{ink}}}.grid{{stroke:{line}}}.axis{{stroke:{muted}}}",
        f".mark{{stroke:{muted};stroke-dasharray:2 3}}",
        f".band{{fill:{series[2]};fill-opacity:.14}}.edge{{stroke:{series[2]};stroke-dasharray:4 3}}",
    ]
    for index, colour in enumerate(series):
        rules.append(f".line{index}{{stroke:{colour};fill:none;stroke-width:1.6;stroke-linejoin:round}}")
        rules.append(f".dot{index}{{fill:{colour}}}.whisker{index}{{stroke:{colour};stroke-width:1.4;fill:none}}")
        rules.append(f".name{index}{{fill:{colour}}}")
    rules.append(f".faint{{stroke:{series[0]};fill:none;stroke-opacity:.45}}")
    return "".join(rules)


_DARK = _plot_rules("#e6e8ea", muted="#9aa3ab", line="#343a40", series=_SERIES_ON_DARK)
PLOT_STYLE = (
    _plot_rules("#1c1e21", muted="#5c636a", line="#dde1e4", series=_SERIES)
    + f"@media (prefers-color-scheme:dark){{{_DARK}}}"
)
"""No custom properties: what draws the PNG files does not know them."""

STYLE = (
    """
:root{color-scheme:light dark;--ink:#1c1e21;--muted:#5c636a;--line:#dde1e4;--paper:#fff;--soft:#f5f6f7;
--trained:#d3f0dc;--on-trained:#06431b;--good:#00795c;--warn:#8a5300;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--muted:#9aa3ab;--line:#343a40;--paper:#15171a;--soft:#1e2125;
--trained:#17472a;--on-trained:#d3f0dc;--good:#2fc79c;--warn:#f0b45a;--bad:#ff8a80}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:45rem;margin:0 auto;padding:2.6rem 1.25rem 4rem}
h1{font-size:1.55rem;line-height:1.25;margin:0;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .9rem;font-weight:650}
h3{font-size:.95rem;margin:1.6rem 0 .4rem;font-weight:600}
p{margin:.5rem 0}
section{margin-top:2.6rem;padding-top:1.5rem;border-top:1px solid var(--line)}
.quiet{color:var(--muted);font-size:.9rem}
.lead{margin:.35rem 0 0;color:var(--muted)}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(7rem,1fr));gap:1.1rem 1rem;margin:1.8rem 0 0}
.tiles dt{font-size:.82rem;color:var(--muted)}.tiles dd{margin:0;font-size:1.3rem;line-height:1.35;font-weight:600}
.tiles dd.aside{font-size:.82rem;font-weight:400;color:var(--muted)}
dl{margin:0}
section>dl{display:grid;grid-template-columns:minmax(7rem,12rem) 1fr;gap:.25rem 1.2rem;font-size:.93rem}
section>dl>dt{color:var(--muted)}section>dl>dd{margin:0;overflow-wrap:anywhere}
figure{margin:1.6rem 0 0}figcaption{font-size:.93rem;font-weight:600;margin-bottom:.15rem}
figure .quiet{margin:.1rem 0 0;font-weight:400}
svg{display:block;width:100%;height:auto;font-family:inherit}
.narrow{display:none}
.scroll{overflow-x:auto}.whole-line{white-space:nowrap}
table{border-collapse:collapse;font-size:.9rem;margin:.3rem 0}
th{text-align:left;font-weight:500;color:var(--muted)}
th,td{padding:.32rem 1.2rem .32rem 0;border-bottom:1px solid var(--line);vertical-align:top}
tr>:last-child{padding-right:0}
td.n,th.n{white-space:nowrap;text-align:right}
pre,.row,.said{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
pre,.said{background:var(--soft);padding:.75rem .9rem;border-radius:6px;margin:.4rem 0}
.row{line-height:1.95;margin:.3rem 0}
.row span{border-radius:3px;padding:1px 0;color:var(--muted);box-shadow:inset -1px 0 var(--line)}
.row .trained{background:var(--trained);color:var(--on-trained)}
.row .stop{background:var(--on-trained);color:var(--trained);font-weight:600}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:0 1rem}
.pair .whole{grid-column:1/-1}.pair .said{margin:.15rem 0 .3rem}
.pair h4{font-size:.82rem;font-weight:500;color:var(--muted);margin:.5rem 0 0}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
@media (max-width:40rem){.wide{display:none}.narrow{display:block}main{padding:1.5rem 1rem 3rem}
section>dl{grid-template-columns:1fr;gap:0}th,td{padding-right:1rem}section>dl>dd{margin-bottom:.5rem}}
@media print{main{max-width:none;padding:0}figure,tr,.pair{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}.wide{display:block}.narrow{display:none}}
"""
    + PLOT_STYLE
)
