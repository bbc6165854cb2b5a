"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);

  // Dark or light: the reader's system decides until the button is pressed.
  const root = document.documentElement;
  try { const kept = localStorage.getItem("snnbench-theme"); if (kept) root.dataset.theme = kept; } catch (_) { /* no storage */ }
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("snnbench-theme", root.dataset.theme); } catch (_) { /* no storage */ }
  });

  // Sorting: numbers by size, words by alphabet, what is absent last either way.
  const keyOf = (cell) => {
    if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
    const text = cell.textContent.trim();
    if (text === "–" || text === "") return null;
    const n = Number(text);
    return Number.isNaN(n) ? text.toLowerCase() : n;
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  };
  const sort = (table, place, down) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, i) => ({ row, i, key: keyOf(row.cells[place]) }));
    rows.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.i - b.i;
      return (down ? -1 : 1) * compare(a.key, b.key) || a.i - b.i;
    });
    body.append(...rows.map((r) => r.row));
    [...table.tHead.rows[0].cells].forEach((th, i) => {
      if (i === place) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
  };
  for (const table of document.querySelectorAll("table.figures")) {
    [...table.tHead.rows[0].cells].forEach((th, place) => {
      th.firstElementChild.addEventListener("click", () => {
        sort(table, place, th.getAttribute("aria-sort") === "ascending");
      });
    });
  }

  // Filtering: every word must stand in the row.
  for (const tools of document.querySelectorAll(".tools")) {
    const rows = [...byId(tools.dataset.for).tBodies[0].rows];
    const texts = rows.map((row) => [...row.cells].map((c) => c.textContent).join(" ").toLowerCase());
    const input = tools.querySelector("input");
    const select = tools.querySelector("select");
    const update = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const status = select ? select.value : "";
      let shown = 0;
      rows.forEach((row, i) => {
        const fits = words.every((w) => texts[i].includes(w)) && (!status || row.dataset.s === status);
        row.hidden = !fits;
        shown += fits;
      });
      tools.querySelector("output").textContent = `${shown} of ${rows.length} ${tools.dataset.noun}`;
    };
    input.addEventListener("input", update);
    if (select) select.addEventListener("change", update);
    if (input.value || (select && select.value)) update();  // a page that was reloaded
  }

  // One run, built from text nodes only: nothing in a record can become markup.
  const element = (name, text, css) => {
    const e = document.createElement(name);
    if (text !== undefined) e.textContent = text;
    if (css) e.className = css;
    return e;
  };
  const show = (v) => v === null || v === undefined ? "–"
    : typeof v === "number" ? String(Number(v.toPrecision(6)))
    : typeof v === "object" ? JSON.stringify(v) : String(v);
  const list = (values) => {
    const dl = element("dl");
    const walk = (object, path) => {
      for (const [k, v] of Object.entries(object)) {
        if (v && typeof v === "object" && !Array.isArray(v)) walk(v, `${path}${k}.`);
        else if (v !== null && v !== undefined) dl.append(element("dt", path + k), element("dd", show(v)));
      }
    };
    walk(values, "");
    return dl;
  };
  const part = (title, content) => {
    const div = element("div");
    div.append(element("h3", title), content);
    return div;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const svg = (name, attributes, text) => {
    const e = document.createElementNS(SVG, name);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const COLOURS = ["#0072B2", "#D55E00"];
  const chart = (title, xs, lines) => {
    const W = 440, H = 200, L = 58, R = 8, T = 20, B = 24;
    const box = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": title });
    const values = lines.flatMap((l) => l.values).filter((v) => v !== null);
    if (!values.length) return null;
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= 0.5; high += 0.5; }
    const x0 = xs[0], x1 = xs[xs.length - 1] === x0 ? x0 + 1 : xs[xs.length - 1];
    const X = (x) => L + (W - L - R) * (x - x0) / (x1 - x0);
    const Y = (y) => H - B - (H - T - B) * (y - low) / (high - low);
    for (const y of [low, (low + high) / 2, high]) {
      box.append(svg("line", { x1: L, x2: W - R, y1: Y(y), y2: Y(y), stroke: "currentColor", "stroke-opacity": 0.15 }));
      box.append(svg("text", { x: L - 6, y: Y(y) + 4, "text-anchor": "end" }, show(Number(y.toPrecision(3)))));
    }
    box.append(svg("text", { x: X(x0), y: H - 6 }, `epoch ${x0}`));
    box.append(svg("text", { x: W - R, y: H - 6, "text-anchor": "end" }, String(xs[xs.length - 1])));
    let at = L;
    lines.forEach((line, i) => {
      const d = line.values.map((y, k) => y === null ? "" : `${X(xs[k]).toFixed(1)},${Y(y).toFixed(1)}`).filter(Boolean);
      if (!d.length) return;
      box.append(svg("polyline", { points: d.join(" "), fill: "none", stroke: COLOURS[i], "stroke-width": 1.8,
        "stroke-dasharray": i ? "5 3" : "none" }));
      if (d.length === 1) box.append(svg("circle", { cx: d[0].split(",")[0], cy: d[0].split(",")[1], r: 3, fill: COLOURS[i] }));
      const label = svg("text", { x: at, y: 12 });
      label.textContent = `${i ? "╌" : "━"} ${line.name}`;
      label.setAttribute("style", `fill: ${COLOURS[i]}`);
      box.append(label);
      at += 20 + 7 * line.name.length;
    });
    return box;
  };
  const layerTable = (layers) => {
    const table = element("table", undefined, "small");
    const head = element("tr");
    for (const c of data.layer_columns) head.append(element("th", c));
    const top = element("thead");
    top.append(head);
    const body = element("tbody");
    for (const layer of layers) {
      const row = element("tr");
      for (const v of layer) row.append(element("td", show(v)));
      body.append(row);
    }
    table.append(top, body);
    const box = element("div", undefined, "scroll");
    box.append(table);
    return box;
  };
  const dialog = byId("run");
  const open = (i) => {
    const run = data.runs[i];
    const body = byId("run-body");
    byId("run-title").textContent = run.id;
    const state = element("p");
    state.append(element("span", run.status, `pill ${run.status}`), ` ${run.reason || ""}`);
    body.replaceChildren(state);
    if (run.curve) {
      const [epochs, loss, val, test] = run.curve;
      const percent = (v) => v.map((y) => y === null ? null : 100 * y);
      const charts = [
        chart("accuracy by epoch, %", epochs, [{ name: "test %", values: percent(test) }, { name: "validation %", values: percent(val) }]),
        chart("training loss by epoch", epochs, [{ name: "training loss", values: loss }]),
      ].filter(Boolean);
      const pair = element("div", undefined, "pair");
      pair.append(...charts);
      if (charts.length) body.append(part(run.every > 1 ? `Curves (every ${run.every}th epoch)` : "Curves", pair));
    }
    const pair = element("div", undefined, "pair");
    pair.append(part("Figures", list(run.figures)), part("Spec", list({ ...run.spec, ...data.settings[run.settings] })));
    body.append(pair);
    if (run.layers) body.append(part("Layers", layerTable(run.layers)));
    if (run.nulls) body.append(part("Not measured", list(run.nulls)));
    body.append(part("Machine", list(data.machines[run.machine] || {})));
    body.append(part("End of the log", run.log ? element("pre", run.log) : element("p", "no log was kept or it is empty", "legend")));
    history.replaceState(null, "", `#run=${encodeURIComponent(run.id)}`);
    dialog.showModal();
    dialog.scrollTop = 0;
  };
  let opener = null;
  byId("rows").addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (button) { opener = button; open(Number(button.dataset.run)); }
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    history.replaceState(null, "", location.pathname + location.search);
    if (opener) opener.focus();
  });
  const wanted = /^#run=(.+)$/.exec(location.hash);
  if (wanted) {
    const i = data.runs.findIndex((r) => r.id === decodeURIComponent(wanted[1]));
    if (i >= 0) open(i);
  }
  document.documentElement.dataset.ready = "yes";
})();
