"""How the report of a run looks: its style sheet, for light and dark screens, for phones and for paper."""

STATES = {"completed": "good", "preempted": "warn", "running": "warn", "diverged": "bad", "failed": "bad"}
"""States of a run to the class of their badge."""

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8;
  --c0: #1f6fb4; --c1: #c2410c; --c2: #6b7280; --c3: #15803d; --mark: #fff4d6; --good: #15803d; --warn: #a16207;
  --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2127; --ink: #e6e9ed; --soft: #9aa4b1;
  --line: #323943; --c0: #6db3f2; --c1: #fb923c; --c2: #9ca3af; --c3: #6ee7a0; --mark: #3a3113; --good: #4ade80;
  --warn: #facc15; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { display: inline; margin: 0 10px 0 0; font-size: 26px; }
h2 { margin: 34px 0 12px; font-size: 18px; }
header p { margin: 10px 0 0; max-width: 46em; }
.badge { padding: 2px 10px; border: 1px solid currentColor; border-radius: 99px; font-size: 13px; vertical-align: 4px;
  white-space: nowrap; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); } .quiet { color: var(--soft); }
.note, .legend, footer, small { color: var(--soft); }
.legend { margin: 0 0 8px; font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; color: var(--soft); }
th, td { padding: 3px 18px 3px 0; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); break-inside: avoid; }
.settings { display: block; columns: 3 250px; column-gap: 26px; font-size: 13.5px; }
.settings tbody { display: contents; }
.settings tr { display: flex; justify-content: space-between; gap: 12px; padding: 0 6px; }
.settings th, .settings td { padding: 3px 0; }
.settings td { text-align: right; }
.changed { background: var(--mark); } .changed th, .changed td { color: var(--ink); font-weight: 600; }
figure { margin: 0; padding: 12px 14px; background: var(--card); border-radius: 8px; min-width: 0;
  break-inside: avoid; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; margin-bottom: 6px;
  font-size: 14px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
svg { display: block; width: 100%; height: auto; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.key { font-size: 13px; color: var(--soft); white-space: nowrap; }
.key i { display: inline-block; width: 20px; margin-right: 6px; border-top: 2px solid; vertical-align: middle; }
.key i.dashed { border-top-style: dashed; }
.key i.c0 { color: var(--c0); } .key i.c1 { color: var(--c1); } .key i.c2 { color: var(--c2); }
.key i.c3 { color: var(--c3); }
.tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.grid, .axis { stroke: var(--line); fill: none; } .axis { stroke: var(--soft); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.faint { opacity: .28; stroke-width: 1; } path.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); } path.c2 { stroke: var(--c2); }
path.c3 { stroke: var(--c3); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); }
footer { margin-top: 40px; font-size: 13px; }
@media print { :root { color-scheme: light; --paper: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444;
  --line: #cccccc; --c0: #1f6fb4; --c1: #c2410c; --c2: #6b7280; --c3: #15803d; --mark: #eeeeee; }
  main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure { border: 1px solid var(--line); }
  .figures, .pictures { grid-template-columns: 1fr 1fr; } }
"""

HEAD = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{_STYLE}</style>
"""
"""All that comes before the title."""
