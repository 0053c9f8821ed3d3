"""The stylesheet of all pages; page.py inlines it.

Colours are named by their meaning, and each is defined for the light and for the dark setting. In
both settings, text has a contrast of at least 4.5 to 1 with its background.
"""

STYLESHEET = """
:root{--page:#f5f6f8;--card:#fff;--ink:#171a1f;--muted:#59616d;--rule:#e2e5ea;--faint:#eef0f3;
--s1:#2b5fd0;--s2:#b4540a;--s3:#0d7a6f;--s4:#8a3fb0;
--good:#136c3b;--good-back:#e7f5ec;--bad:#b3231b;--bad-back:#fdeceb;--warn:#815300;
--warn-back:#fdf3dc;--plain-back:#eceff4}
@media (prefers-color-scheme:dark){:root{--page:#0e1115;--card:#161a20;--ink:#e5e8ed;
--muted:#98a2b0;--rule:#2a3038;--faint:#20262d;--s1:#7aa5ff;--s2:#eda35f;--s3:#4fc3b4;--s4:#cb9be8;
--good:#62cf90;--good-back:#11281c;--bad:#ff8f86;--bad-back:#2e1716;--warn:#eebf63;
--warn-back:#2b2312;--plain-back:#222831}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1160px;margin:0 auto;padding:28px 24px 40px}
.top{margin:0 0 18px}
.brand{margin:0;color:var(--muted);font-size:12px;font-weight:600;letter-spacing:.08em;
text-transform:uppercase}
h1{margin:2px 0 0;font-size:26px;line-height:1.25;font-weight:650;letter-spacing:-.01em;
overflow-wrap:anywhere}
.subtitle{margin:4px 0 0;color:var(--muted);overflow-wrap:anywhere}
.heading{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 12px;margin:0 0 14px}
h2{margin:0;font-size:16px;font-weight:650}
h3{margin:20px 0 8px;font-size:14px;font-weight:600}
h3.flush{margin-top:0}
.note{margin:0;color:var(--muted);font-size:13px}
.muted{color:var(--muted);font-size:13px;margin:8px 0}
.text{margin:8px 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:18px 20px;
margin:0 0 14px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:20px 28px;align-items:start}
.pair>*{min-width:0}
.pair h2{margin:0 0 8px}
.banner{display:flex;gap:14px;align-items:baseline;border-radius:10px;padding:14px 18px;
margin:0 0 14px;border:1px solid}
.banner strong{font-size:18px;font-weight:700;white-space:nowrap}
.banner p{margin:0;color:var(--ink);overflow-wrap:anywhere}
.banner .small{color:var(--muted);font-size:13px;margin-top:2px}
.banner.good,.badge.good{color:var(--good);background:var(--good-back)}
.banner.bad,.badge.bad{color:var(--bad);background:var(--bad-back)}
.banner.warn,.badge.warn{color:var(--warn);background:var(--warn-back)}
.banner.plain,.badge.plain{color:var(--ink);background:var(--plain-back)}
.banner{border-color:color-mix(in srgb,currentColor 30%,transparent)}
.badge{display:inline-block;border-radius:99px;padding:1px 9px;font-size:12px;font-weight:600;
white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:1px;
margin:0 0 14px;
background:var(--card);border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.tile{box-shadow:0 0 0 1px var(--rule);padding:12px 16px}
.tile dt{color:var(--muted);font-size:12.5px}
.tile dd{margin:1px 0 0;font-size:21px;font-weight:650;letter-spacing:-.01em}
.tile .below{font-size:12.5px;font-weight:400;color:var(--muted);letter-spacing:0}
.facts{margin:0;font-size:14px}
.facts>div{display:flex;justify-content:space-between;gap:16px;padding:5px 0;
border-bottom:1px solid var(--faint)}
.facts>div:last-child{border-bottom:0}
.facts dt{color:var(--muted);flex:0 1 auto}
.facts dd{margin:0;text-align:right;overflow-wrap:anywhere;flex:0 1 auto;min-width:30%}
.todo{margin:0;font-size:14px}
.todo>div{padding:5px 0;border-bottom:1px solid var(--faint)}
.todo>div:last-child{border-bottom:0}
.todo dt{color:var(--muted);font-size:12.5px}
.todo dd{margin:0;overflow-wrap:anywhere}
a{color:var(--s1)}
.scroll{overflow-x:auto;margin-top:12px}
table{width:100%;border-collapse:collapse;font-size:14px}
caption{text-align:left;color:var(--muted);font-size:13px;padding:0 0 6px}
th{text-align:left;color:var(--muted);font-size:12.5px;font-weight:600;border-bottom:1px solid
var(--rule);padding:4px 16px 6px 0;white-space:nowrap}
td{border-bottom:1px solid var(--faint);padding:7px 16px 7px 0;vertical-align:top}
tr:last-child td{border-bottom:0}
table:not(.prose) td:first-child{min-width:8em}
th:last-child,td:last-child{padding-right:0}
.number{text-align:right;white-space:nowrap}
table.prose{table-layout:fixed}
table.prose th:first-child:not(:nth-last-child(-n+2)){width:20%}
table.prose td{overflow-wrap:anywhere;white-space:pre-wrap}
code,pre{font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{overflow-wrap:anywhere}
code span{white-space:nowrap}
pre{margin:8px 0 0;padding:12px 14px;background:var(--faint);border-radius:6px;overflow-x:auto}
details{margin:10px 0 0}
summary{cursor:pointer;font-size:14px;color:var(--muted)}
summary:hover{color:var(--ink)}
figure{margin:0}
figcaption{font-size:14px;font-weight:600;margin:0 0 6px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 6px;padding:0;
font-size:13px;color:var(--muted)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px;
background:currentColor}
.legend i{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.legend .hollow{background:none;border:2px solid var(--muted)}
i.s1{color:var(--s1)}i.s2{color:var(--s2)}i.s3{color:var(--s3)}i.s4{color:var(--s4)}
svg{display:block;width:100%;height:auto;font-family:inherit;font-size:12px}
svg.chart{max-width:680px}svg.narrow{display:none;overflow:visible}
svg text{fill:var(--ink)}
svg .tick,svg .axis{fill:var(--muted)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .grid.zero{stroke:var(--muted)}
svg .base,svg .tickmark{stroke:var(--muted);stroke-width:1}
svg .curve{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke:currentColor}
svg .dot{fill:currentColor;stroke:var(--card);stroke-width:1.5}
svg .bar{fill:currentColor}
svg .s1{color:var(--s1)}svg .s2{color:var(--s2)}svg .s3{color:var(--s3)}svg .s4{color:var(--s4)}
svg .rest{color:var(--muted);opacity:.55}
svg .hit{fill:transparent}
svg .hit:hover{fill:var(--ink);fill-opacity:.25}
svg line.mark{stroke:var(--s2);stroke-width:1.25;stroke-dasharray:4 3}
svg text.mark{fill:var(--s2);font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg .name{font-weight:600}
svg .link{stroke:var(--s1);stroke-width:2;opacity:.45}
svg .hollow{fill:var(--card);stroke:var(--muted);stroke-width:2}
svg .better{color:var(--good)}svg .worse{color:var(--bad)}svg .undecided{color:var(--muted)}
svg .interval{stroke:currentColor;stroke-width:2.25}
svg .estimate{fill:currentColor;stroke:var(--card);stroke-width:1.5}
.line .across{min-width:900px;font-size:12.5px}
.line .down{display:none;font-size:13px;max-width:480px}
.line .edge{fill:none;stroke:var(--muted);stroke-width:1.25;opacity:.7}
.line .edge.idle{stroke-dasharray:3 4;opacity:.55}
.line .box{fill:var(--card);stroke:var(--rule);stroke-width:1.25}
.line .disc{fill:currentColor}
.line .sign{fill:none;stroke:var(--card);stroke-width:1.8;stroke-linecap:round;
stroke-linejoin:round}
.line .step{font-weight:650}
.line .time{fill:var(--ink)}
.line .detail{fill:var(--muted)}
.line .track{fill:var(--faint)}
.line .spent{fill:currentColor}
.line .finished{color:var(--good)}
.line .failed{color:var(--bad)}
.line .running{color:var(--s1)}
.line .not-run,.line .skipped,.line .next{color:var(--muted)}
.line .failed .box{stroke:var(--bad);fill:var(--bad-back)}
.line .finished .spent{fill:var(--s1)}
.line .not-run .step,.line .not-run .time,.line .skipped .step,.line .skipped .time
{fill:var(--muted)}
.line .not-run .box,.line .skipped .box{stroke-dasharray:4 3}
footer{color:var(--muted);font-size:12.5px;margin-top:18px}
:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
@media (max-width:820px){.pair{grid-template-columns:1fr}.line .across{display:none}
.line .down{display:block}}
@media screen and (max-width:820px){table:not(.prose) thead{display:none}
table:not(.prose) tr{display:block;border-bottom:1px solid var(--rule);padding:8px 0}
table:not(.prose) td{display:flow-root;border:0;padding:3px 0;text-align:right;
overflow-wrap:anywhere;white-space:normal}
table:not(.prose) td:first-child{min-width:0;font-weight:600;text-align:left}
table:not(.prose) td::before{content:attr(data-label);color:var(--muted);font-size:12.5px;
font-weight:600;float:left;margin-right:16px}
.badge{white-space:normal}pre{white-space:pre-wrap;overflow-wrap:anywhere}
table:not(.prose) td:first-child::before{content:none}}
@media (max-width:560px){main{padding:18px 12px 28px}.card{padding:14px}h1{font-size:22px}
.banner{flex-direction:column;gap:4px;padding:12px 14px}
.tiles{grid-template-columns:1fr 1fr}.tile{padding:10px 12px}.tile dd{font-size:18px}
table.prose thead{display:none}table.prose tr{display:block;border-bottom:1px solid var(--rule);
padding:8px 0}table.prose td{display:block;border:0;padding:3px 0}
table.prose td::before{content:attr(data-label);display:block;color:var(--muted);font-size:12px;
font-weight:600}}
@media screen and (max-width:560px){svg.wide{display:none}svg.narrow{display:block}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--muted:#444;--rule:#ccc;--faint:#eee;
--s1:#1d4fbf;--s2:#a04400;--s3:#0d6a60;--s4:#73319a;--good:#0e5a31;--good-back:#fff;--bad:#9a1a13;
--bad-back:#fff;--warn:#6b4500;--warn-back:#fff;--plain-back:#fff}
body{font-size:12px}.muted,.banner .small,.todo,.todo dt,.facts,.tile dt,
.tile .below{font-size:10.5px}code,.badge{font-size:10px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(110px,1fr))}.tile{padding:8px 10px}
.tile dd:not(.below){font-size:16px}.facts>div{padding:2px 0}main{max-width:none;padding:0}
.card,.banner,.tiles{break-inside:avoid}
.scroll{overflow:visible}table{font-size:10.5px}th{font-size:10px}
th,td,.number,table:not(.prose) td:first-child{white-space:normal;padding-right:8px}
td.number{white-space:nowrap}td,.badge{overflow-wrap:anywhere}.badge{white-space:normal;padding:0}
tr{break-inside:avoid}.card:has(table),.card:has(pre){break-inside:auto}pre{white-space:pre-wrap}
.line .across{display:block;min-width:0}.line .down{display:none}
details::details-content{content-visibility:visible;display:block;block-size:auto}}
"""
