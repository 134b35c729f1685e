"""The report's style sheet: light and dark, screen, phone and paper."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1a2230;--soft:#5b6675;--rule:#e1e5ea;--a:#1d5fd1;--b:#c2560c;--c:#6b4bb8;--d:#0d7d6c;--good:#12703a;
--good-bg:#dff3e6;--bad:#b3261e;--bad-bg:#fbe3e1;--warn:#8a5300;--warn-bg:#fdeccc;--fill:#d6e2f8;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#10141a;--card:#181e27;--ink:#e6eaf0;--soft:#9aa6b5;--rule:#2b3440;--a:#74a7ff;--b:#ff9d57;
--c:#b79cff;--d:#4fd0ba;--good:#6fdc96;--good-bg:#143322;--bad:#ff8f86;--bad-bg:#43201e;--warn:#ffc46b;--warn-bg:#3f2e10;--fill:#27406b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
header{margin-bottom:18px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 4px}
h3{font-size:14px;margin:18px 0 6px}
p{margin:4px 0 10px;max-width:75ch}
.soft,figcaption{color:var(--soft)}
.pill{font-weight:600;font-size:13px;border-radius:99px;padding:3px 12px;background:var(--good-bg);color:var(--good)}
.pill.bad{background:var(--bad-bg);color:var(--bad)}.pill.warn{background:var(--warn-bg);color:var(--warn)}
.pill.grey{background:var(--bg);color:var(--soft);border:1px solid var(--rule)}
.verdicts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px;margin:0 0 16px}
.verdicts>section{margin:0;min-width:0}.verdicts .pill{display:inline-block;margin:2px 0 6px}
.facts{list-style:none;margin:10px 0 0;padding:0;display:grid;grid-template-columns:repeat(auto-fit,minmax(95px,1fr));gap:10px 14px}
.facts b{display:block;font-size:21px;line-height:1.25;font-variant-numeric:tabular-nums}.facts small{color:var(--soft);display:block;line-height:1.35}
blockquote{margin:4px 0 0;padding:8px 12px;border-left:3px solid var(--rule);background:var(--bg);border-radius:0 8px 8px 0;overflow-wrap:anywhere}
.alert{background:var(--bad-bg);color:var(--bad);border-radius:10px;padding:12px 16px;margin:0 0 18px;overflow-wrap:anywhere}
.alert.warn{background:var(--warn-bg);color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:0 0 16px}
.tile,section{background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile{padding:13px 16px}
.tile b{display:block;font-size:23px;line-height:1.25;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tile small{color:var(--soft);display:block}
section{padding:18px 20px;margin:0 0 16px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:16px;align-items:start}
.two>section{margin:0;min-width:0}.two th,.two td{padding:5px 7px}.two tbody th{white-space:normal}
.long th,.long td{padding:5px 7px}.long td:nth-child(7){white-space:normal;text-align:left;min-width:290px}.two th:first-child{padding-left:0}.two td:last-child{padding-right:0}.two{margin-bottom:16px}
figure{margin:10px 0 0}
svg{display:block;width:100%;height:auto;overflow:visible}
.grid{stroke:var(--rule);stroke-width:1}
.tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.axis{fill:var(--soft);font-size:11.5px}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c);stroke-dasharray:6 3}.line.d{stroke:var(--d);stroke-dasharray:6 3}
.line.under{stroke-width:7;opacity:.38;stroke-dasharray:none}
.line.limit{stroke:var(--bad);stroke-width:1.4;stroke-dasharray:2 3}
.mark{stroke:var(--card);stroke-width:.8}
.mark.a{fill:var(--a)}.mark.b{fill:var(--b)}.mark.c{fill:var(--c)}.mark.d{fill:var(--d)}
.bad path{stroke:var(--bad);stroke-width:2.2;fill:none}
.legend{list-style:none;margin:8px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:4px 20px;font-size:13px;color:var(--soft)}
.legend li{display:flex;align-items:center;gap:7px}.legend svg{width:26px;height:12px}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--rule);font-variant-numeric:tabular-nums;white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:12.5px}
th:first-child,td:first-child,td.text,th.text{text-align:left}
tbody th{color:var(--ink);font-weight:400;font-size:13.5px}
tr:last-child>*{border-bottom:0}
tr.bad>*{background:var(--bad-bg);color:var(--bad)}
dl{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:4px 18px;margin:8px 0 0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.bar{display:block;min-width:90px;height:9px;border-radius:5px;background:var(--fill);overflow:hidden}
.bar i{display:block;height:100%;border-radius:5px;background:var(--a)}
pre{background:var(--bg);border:1px solid var(--rule);border-radius:8px;padding:10px 12px;margin:8px 0 0;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{border-top:1px solid var(--rule);margin-top:10px;padding-top:8px}
summary{cursor:pointer;font-weight:600;font-size:14px}
ul.notes{margin:6px 0 0;padding-left:20px}
footer{color:var(--soft);font-size:13px;margin-top:22px}
@media (max-width:560px){main{padding:18px 12px 40px}section{padding:14px}h1{font-size:21px}.tick,.axis{font-size:19px}
.line{stroke-width:2.6}th,td{padding:5px 7px}.bar{min-width:56px}.two th,.two td{padding:5px 4px}.two thead th{white-space:normal}
.two .bar{min-width:34px}.facts{grid-template-columns:1fr 1fr}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#ccc;--a:#1d5fd1;--b:#c2560c;--c:#6b4bb8;--d:#0d7d6c;--good:#12703a;
--good-bg:#fff;--bad:#b3261e;--bad-bg:#fff;--warn:#8a5300;--warn-bg:#fff;--fill:#d6e2f8}main{max-width:none;padding:0}section,.tile,tr{break-inside:avoid}
section.long{break-inside:auto}details::details-content{content-visibility:visible;block-size:auto}body{font-size:11pt;
print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
