"use strict";

const EVERY_MS = 2000;
const MOST_ROWS = 64;
const NAMES = { F: "FULL", S: "SPARSE", "-": "not routed" };
const STYLES = { F: "full", S: "sparse", "-": "unrouted" };
// What a worker says of itself, in the order shown.
const LABELS = {
  model_name: "Model",
  policy: "Policy",
  base_model: "Router trained for",
  threshold: "FULL where P(FULL) is at least",
  sparse_pattern: "Sparse pattern",
  sink_tokens: "Sink tokens",
  window_tokens: "Window tokens",
  full_decode_tokens: "Tokens decoded fully",
  sparse_prefill: "All prompts SPARSE",
  probe: "Probe, first + last tokens",
  pools: "Queries averaged over",
  routed_layers: "Routed layers",
  requests: "Requests routed",
};

const byId = (id) => document.getElementById(id);
const table = byId("map");
const [head, body] = [table.tHead, table.tBodies[0]];
const details = new WeakMap(); // cell -> what the line above the table says of it
let isPaused = false;
let timer;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function put(id, text) {
  const found = byId(id);
  if (found.textContent !== text) found.textContent = text; // a screen reader hears changes only
}

const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(0)} %`);
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hourCycle: "h23" });
const count = (text, letter) => text.split(letter).length - 1;

function sparseShare(routes) {
  const routed = routes.length - count(routes, "-");
  return routed ? count(routes, "S") / routed : null;
}

// The table.

function showHead(layers) {
  if (head.rows.length && head.rows[0].cells.length === layers + 1) return;
  const numbers = element("tr", "");
  const shares = element("tr", "");
  numbers.append(element("th", "SPARSE · time", { scope: "col" }));
  shares.append(element("th", "share FULL", { scope: "row" }));
  for (let layer = 0; layer < layers; layer++) {
    numbers.append(element("th", String(layer), { scope: "col", "aria-label": `layer ${layer}` }));
    shares.append(element("td", "", { tabindex: "-1", role: "gridcell" }));
  }
  head.replaceChildren(numbers, shares);
  body.replaceChildren();
}

function showShares(requests) {
  const cells = [...head.rows[1].cells].slice(1);
  cells.forEach((cell, layer) => {
    const letters = requests.map((request) => request.routes[layer] ?? "-").join("");
    const share = sparseShare(letters);
    const text = share === null ? "not routed" : `${percent(1 - share)} FULL, ${percent(share)} SPARSE`;
    cell.className = share === null ? "unrouted" : "share";
    cell.style.setProperty("--full-share", share === null ? "0%" : `${100 * (1 - share)}%`);
    cell.setAttribute("aria-label", text);
    details.set(cell, `Layer ${layer}, ${requests.length} requests: ${text}.`);
  });
}

function rowOf(request, engineNames, layers) {
  const row = element("tr", "", { "data-key": keyOf(request), class: "new" });
  const share = sparseShare(request.routes);
  const engine = engineNames.size > 1 ? `, engine ${engineNames.get(request.engine)}` : "";
  const size = `${request.prompt_tokens.toLocaleString()} prompt tokens${engine}`;
  const who = `${clock(request.time)}, ${size}`;
  const label = `${percent(share)} SPARSE, ${who}`;
  const header = element("th", `${percent(share)} · ${clock(request.time)}`, {
    scope: "row",
    "aria-label": label,
  });
  header.append(element("span", ` · ${size}`, { class: "wide" }));
  row.append(header);
  for (let layer = 0; layer < layers; layer++) {
    const letter = request.routes[layer] ?? "-";
    const p = request.full_probability[layer] ?? null;
    const text = NAMES[letter] + (p === null ? "" : `, P(FULL) ${p.toFixed(3)}`);
    const cell = element("td", letter === "-" ? "–" : letter, {
      class: STYLES[letter],
      tabindex: "-1",
      role: "gridcell",
      "aria-label": text,
    });
    details.set(cell, `${who}, layer ${layer}: ${text}.`);
    row.append(cell);
  }
  return row;
}

const keyOf = (request) => `${request.engine} ${request.number}`;

function showMap(requests, engines) {
  table.hidden = requests.length === 0;
  if (table.hidden) return;
  const layers = Math.max(...requests.map((request) => request.routes.length));
  showHead(layers);
  showShares(requests);
  const engineNames = new Map(engines.map((engine, index) => [engine.id, index]));
  // Rows that stay are kept as they are, so that focus and scrolling survive an update.
  const kept = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  requests.forEach((request, index) => {
    const row = kept.get(keyOf(request)) ?? rowOf(request, engineNames, layers);
    kept.delete(keyOf(request));
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
  });
  for (const row of kept.values()) row.remove();
  if (!table.querySelector("td[tabindex='0']")) body.rows[0].cells[1].tabIndex = 0;
}

function focusCell(cell) {
  table.querySelectorAll("td[tabindex='0']").forEach((old) => { old.tabIndex = -1; });
  cell.tabIndex = 0;
  cell.focus();
}

table.addEventListener("keydown", (event) => {
  const cell = event.target.closest("td");
  if (!cell) return;
  const rows = [...table.rows].slice(1);
  let row = rows.indexOf(cell.parentElement);
  let column = cell.cellIndex;
  const last = cell.parentElement.cells.length - 1;
  if (event.key === "ArrowRight") column++;
  else if (event.key === "ArrowLeft") column--;
  else if (event.key === "ArrowDown") row++;
  else if (event.key === "ArrowUp") row--;
  else if (event.key === "Home") column = 1;
  else if (event.key === "End") column = last;
  else return;
  event.preventDefault();
  const next = rows[row]?.cells[column];
  if (next && column >= 1) focusCell(next);
});

for (const kind of ["focusin", "pointerover"]) {
  table.addEventListener(kind, (event) => {
    const text = details.get(event.target);
    if (text) put("detail", text);
  });
}

// The rest of the page.

function showEngines(engines) {
  const text = JSON.stringify(engines);
  if (byId("engines").dataset.shown === text) return;
  byId("engines").dataset.shown = text;
  byId("engines").replaceChildren(...engines.map((engine) => {
    const list = element("dl", "");
    for (const [key, label] of Object.entries(LABELS)) {
      const value = key === "routed_layers"
        ? `${engine.routed_layers.length} of ${engine.num_layers}` : engine[key];
      if (value === "" || value === undefined) continue;
      const pair = element("div", "");
      pair.append(element("dt", label), element("dd", String(value)));
      list.append(pair);
    }
    return list;
  }));
}

function show(found) {
  const { engines, requests } = found;
  showMap(requests, engines);
  showEngines(engines);
  put("shown", String(requests.length));
  put("sparse", percent(sparseShare(requests.map((request) => request.routes).join(""))));
  for (const phase of ["prefill", "decode"]) {
    put(`saved-${phase}`, percent(found.kv_reading[phase].saved));
  }
  put("requests", engines.reduce((sum, engine) => sum + engine.requests, 0).toLocaleString());
  const ended = found.ended_engines
    ? ` ${found.ended_engines} ended, whose requests are left out.` : "";
  let state = `${engines.length} running engine${engines.length === 1 ? "" : "s"}.${ended}`;
  if (!engines.length) state = `No engine is running.${ended}`;
  else if (!requests.length) state += " No request has been routed yet.";
  put("state", state);
}

async function update() {
  clearTimeout(timer);
  if (isPaused || document.hidden) return;
  try {
    const answer = await fetch(`flux/routes.json?limit=${MOST_ROWS}`, { cache: "no-store" });
    const found = await answer.json();
    if (isPaused) return;
    if (!answer.ok) throw new Error(found.error?.message ?? `status ${answer.status}`);
    show(found);
    byId("live").classList.remove("stale");
    byId("live").dataset.updated = Date.now();
  } catch (error) {
    if (!byId("live").classList.contains("stale")) {
      put("state", `No numbers since ${clock(Date.now() / 1000)} (${error.message}); `
        + "what is shown is old.");
    }
    byId("live").classList.add("stale");
  }
  byId("live").setAttribute("aria-busy", "false");
  clearTimeout(timer);
  timer = setTimeout(update, EVERY_MS);
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  if (isPaused) put("state", `Paused at ${clock(Date.now() / 1000)}.`);
  update();
});
document.addEventListener("visibilitychange", update);
update();
