"""The report's style sheet and script: part of the one file, so that it opens anywhere and needs no network."""

CSS = """
:root { color-scheme: light dark;
  --page:#fafaf8; --sheet:#fff; --ink:#1d2125; --soft:#5b646d; --rule:#e2e4e6; --grid:#ecedef; --wash:#f3f4f4;
  --blue:#0a6ab0; --orange:#c76a00; --green:#00805c; --sky:#4aa3d8; --purple:#b0588c; --red:#c24a00;
  --yellow:#d8b500; --gray:#9aa2aa; --brown:#8a6a3c; --good:#00704f; --bad:#b03a00; }
@media (prefers-color-scheme: dark) { :root {
  --page:#121416; --sheet:#191c1f; --ink:#e4e6e8; --soft:#9aa3ab; --rule:#2c3136; --grid:#24292d; --wash:#212529;
  --blue:#5aaee8; --orange:#e8a04a; --green:#3dbb93; --sky:#8fcbf0; --purple:#dc94bd; --red:#ec7f45;
  --yellow:#ecd66a; --gray:#727b84; --brown:#c7a46a; --good:#4cc9a0; --bad:#f0915f; } }
* { box-sizing:border-box; margin:0 }
html { -webkit-text-size-adjust:100% }
body { background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
  "Noto Sans","DejaVu Sans",sans-serif; font-variant-numeric:tabular-nums; padding:2.5rem clamp(1rem,4vw,3rem) 4rem }
main, body > header, body > footer { max-width:78rem; margin-inline:auto }
h1 { font-size:1.75rem; line-height:1.2; font-weight:650; letter-spacing:-.015em; overflow-wrap:anywhere }
h2 { font-size:1.15rem; font-weight:650; letter-spacing:-.01em; margin:3rem 0 .25rem }
h3 { font-size:.9rem; font-weight:600 }
p.lead, .kicker, .note, footer { color:var(--soft); font-size:.86rem }
p.lead { margin-bottom:1rem; max-width:56rem }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,10rem),1fr)); gap:1px; margin-top:1.5rem;
  background:var(--sheet); border:1px solid var(--rule); border-radius:8px; overflow:hidden }
.tiles > div { box-shadow:0 0 0 1px var(--rule); padding:.85rem 1.1rem 1rem }
.tiles dt, .facts dt { color:var(--soft); font-size:.8rem }
.tiles dd { font-size:1.4rem; font-weight:600; letter-spacing:-.015em; line-height:1.35; white-space:nowrap }
.tiles dd.sub { font-size:.82rem; font-weight:400; letter-spacing:0; color:var(--soft); white-space:normal }
.tiles .from { color:var(--soft); font-weight:400 }
.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr)); gap:.5rem 2rem;
  margin-top:1.25rem }
.facts > div { display:grid; grid-template-columns:7.2rem 1fr; align-items:baseline }
.facts dd { font-size:.86rem; overflow-wrap:anywhere }
.notice { border-left:3px solid var(--red); background:var(--sheet); padding:.5rem .9rem; margin-top:1rem;
  font-size:.88rem }
.charts { display:grid; gap:1rem; grid-template-columns:repeat(6,1fr); margin-top:.75rem }
.chart { grid-column:span 2; background:var(--sheet); border:1px solid var(--rule); border-radius:8px;
  padding:.8rem .9rem .6rem; min-width:0; --tall:8.5rem }
.chart.wide { grid-column:span 3; --tall:13rem }
.chart.full { grid-column:1/-1; --tall:15rem }
@media (max-width:60rem) { .chart { grid-column:span 3 } }
@media (max-width:42rem) { .chart, .chart.wide { grid-column:1/-1; --tall:10rem } body { padding-top:1.5rem }
  .tiles > div { padding:.6rem .8rem .7rem } .tiles dd { font-size:1.1rem } h1 { font-size:1.35rem } }
figcaption { display:flex; flex-wrap:wrap; gap:0 1rem; align-items:baseline; justify-content:space-between;
  min-height:1.5rem; margin-bottom:.5rem }
.legend { list-style:none; padding:0; display:flex; flex-wrap:wrap; gap:0 .9rem; font-size:.8rem; color:var(--soft) }
.legend i { display:inline-block; width:.9em; height:3px; border-radius:2px; vertical-align:.22em; margin-right:.4em;
  background:var(--swatch) }
.legend i.dashed { background:repeating-linear-gradient(90deg,var(--swatch) 0 4px,transparent 4px 6px) }
.full .legend i { height:.7em; vertical-align:-.04em }
.legend output { color:var(--ink); font-weight:600; display:inline-block; min-width:3.2em }
.plot { position:relative; padding:0 0 1.35rem 3rem }
.area { position:relative; height:var(--tall); touch-action:pan-y; cursor:crosshair }
.area:focus-visible { outline:2px solid var(--blue); outline-offset:4px; border-radius:2px }
svg { position:absolute; inset:0; width:100%; height:100%; overflow:visible; clip-path:inset(-3px -4px) }
path { fill:none; vector-effect:non-scaling-stroke; stroke-linejoin:round; stroke-linecap:round }
.grid { stroke:var(--grid); stroke-width:1 }
.line { stroke-width:1.75 } .line.raw { stroke-width:1; opacity:.38 } .dot { stroke-width:5.5 }
.band { opacity:.14; stroke:none } .bar { stroke:var(--sheet); stroke-width:.4 }
.cursor { position:absolute; top:0; bottom:0; width:1px; background:var(--soft); display:none; pointer-events:none }
.cursor::after { content:attr(data-step); position:absolute; top:100%; translate:var(--shift) .15rem;
  white-space:nowrap; background:var(--ink); color:var(--page); border-radius:3px; padding:.12rem .35rem;
  font-size:.74rem; line-height:1.2; font-style:normal; font-weight:600; z-index:1 }
.x, .y { position:absolute; color:var(--soft); font-size:.74rem; line-height:1; pointer-events:none }
.x { left:3rem; right:0; bottom:0; height:.9rem } .y { left:0; width:2.6rem; top:0; height:var(--tall) }
.x span { position:absolute; transform:translateX(-50%) }
.y span { position:absolute; right:0; transform:translateY(-50%); white-space:nowrap }
.note { margin-top:.35rem; font-size:.78rem }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:.86rem; margin-top:1rem; min-width:min(100%,34rem) }
th, td { text-align:right; padding:.28rem 0 .28rem 1.6rem; border-bottom:1px solid var(--rule); white-space:nowrap }
th { font-weight:500; color:var(--soft); font-size:.8rem }
th:first-child, td:first-child { text-align:left; padding-left:0 }
td:nth-child(2) { text-align:left; color:var(--soft) }
td.share { width:11rem } tfoot td { font-weight:650; border-bottom:0 }
td .fill { display:block; height:.55rem; border-radius:2px; background:var(--swatch); min-width:1px }
td .key { display:inline-block; width:.7em; height:.7em; border-radius:2px; background:var(--swatch);
  margin-right:.6em }
@media (max-width:42rem) { table { min-width:100% } th, td { padding-left:.8rem }
  th:nth-child(2), td:nth-child(2), th:nth-child(6), td:nth-child(6) { display:none } }
.sample { border-top:1px solid var(--rule); padding:1rem 0 1.1rem }
.sample > header { display:flex; flex-wrap:wrap; gap:.1rem 1.5rem; font-size:.82rem; color:var(--soft) }
.sample > header b { color:var(--ink); font-weight:600; overflow-wrap:anywhere }
.pair { display:grid; grid-template-columns:1fr 1fr; gap:.8rem 1rem; margin-top:.6rem }
@media (max-width:42rem) { .pair { grid-template-columns:1fr } }
.sample > .said { margin-top:.5rem }
.said { min-width:0; background:var(--sheet); border:1px solid var(--rule); border-radius:8px; overflow:hidden }
.said .meta { display:flex; flex-wrap:wrap; gap:0 1rem; padding:.4rem .8rem; font-size:.8rem; color:var(--soft);
  border-bottom:1px solid var(--rule) }
.meta b { font-weight:650 } .meta .right { color:var(--good) } .meta .wrong { color:var(--bad) }
pre { font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; white-space:pre-wrap;
  overflow-wrap:anywhere; unicode-bidi:isolate; padding:.6rem .8rem; max-height:20rem; overflow:auto }
pre.prompt { padding:.35rem 0 0; max-height:10rem }
details { margin-top:1rem } summary { cursor:pointer; color:var(--soft); font-size:.9rem }
details[open] > summary { margin-bottom:.5rem }
details > pre { background:var(--sheet); border:1px solid var(--rule); border-radius:8px; max-height:none }
footer { margin-top:3.5rem; border-top:1px solid var(--rule); padding-top:.8rem }
@media print { .said, .chart, .sample { break-inside:avoid } pre { max-height:none } body { padding:0 } }
"""

SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const figures = [...document.querySelectorAll('figure.chart')].map((figure, i) => ({
    area: figure.querySelector('.area'), cursor: figure.querySelector('.cursor'),
    outputs: [...figure.querySelectorAll('output')], ...data.charts[i] }));
  const rest = figures.map(f => f.outputs.map(o => o.textContent));
  const exp = (v, d) => { const [m, e] = v.toExponential(d).split('e'); return m.replace('.0', '') + 'e' + (+e); };
  const show = (v, kind) => {
    if (v === null) return '–';
    if (kind === 'percent') return (100 * v).toFixed(v !== 0 && Math.abs(v) < 0.01 ? 2 : 1) + ' %';
    if (kind === 'seconds') return v < 100 ? v.toFixed(2) + ' s' : v.toFixed(0) + ' s';
    const size = Math.abs(v);
    if (kind === 'count' || size >= 1e5) {
      if (size >= 1e9) return (v / 1e9).toFixed(1) + 'G';
      if (size >= 1e6) return (v / 1e6).toFixed(1) + 'M';
      if (size >= 1e4) return (v / 1e3).toFixed(1) + 'k';
      return size >= 100 || Number.isInteger(v) ? v.toFixed(0) : v.toFixed(1);
    }
    if (size === 0) return '0';
    if (size < 1e-3) return exp(v, 1);
    return v.toFixed(size < 0.1 ? 4 : size < 100 ? 3 : 1);
  };
  let at = null;
  const point = index => {
    at = index;
    const first = data.first[index], last = data.last[index];
    const share = ((first + last) / 2 - data.low) / (data.high - data.low);
    for (const f of figures) {
      f.cursor.style.display = 'block';
      f.cursor.style.left = 100 * share + '%';
      f.cursor.style.setProperty('--shift', -100 * share + '%');
      f.cursor.dataset.step = first === last ? `step ${first}` : `steps ${first}–${last}`;
      f.values.forEach((values, k) => { f.outputs[k].textContent = show(values[index], f.kind); });
    }
  };
  const leave = () => {
    at = null;
    figures.forEach((f, i) => {
      f.cursor.style.display = 'none';
      f.outputs.forEach((output, k) => { output.textContent = rest[i][k]; });
    });
  };
  const nearest = step => {
    let best = 0;
    data.first.forEach((first, i) => {
      const gap = k => Math.abs((data.first[k] + data.last[k]) / 2 - step);
      if (gap(i) < gap(best)) best = i;
    });
    return best;
  };
  for (const { area } of figures) {
    const move = event => {
      const box = area.getBoundingClientRect();
      point(nearest(data.low + (event.clientX - box.left) / box.width * (data.high - data.low)));
    };
    area.addEventListener('pointermove', move);
    area.addEventListener('pointerdown', move);
    area.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') leave(); });
    area.addEventListener('blur', leave);
    area.addEventListener('keydown', event => {
      const last = data.first.length - 1;
      const next = { ArrowLeft: (at ?? last + 1) - 1, ArrowRight: (at ?? -1) + 1, Home: 0, End: last }[event.key];
      if (event.key === 'Escape') leave();
      if (next === undefined) return;
      event.preventDefault();
      point(Math.max(0, Math.min(last, next)));
    });
  }
})();
"""
