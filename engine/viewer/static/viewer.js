// The viewer's page: one or two pictures with layers, shapes, scale and a box; a contact sheet; a run as it is made.
// All that comes from files is put into the page as text, never as HTML. Coordinates are px of the picture.
/* global OpenSeadragon */
const OSD = OpenSeadragon;
const LARGEST_GEOJSON = 32 * 2 ** 20;
const COLUMNS = [["name", "name"], ["caption", "caption"], ["seed", "seed"], ["kid", "KID"], ["detail", "detail"],
  ["agreement", "agreement, dB"], ["seam", "seam score"]];
const $ = (id) => document.getElementById(id);
const NO_SCALE = "No scale bar: µm/px is not stated";
const reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const say = (text) => Object.assign($("message"), { textContent: text || "", hidden: !text });
async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : { method: "POST", body });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.problem || answer.statusText);
  return said;
}
const tried = (work) => async (...given) => { try { await work(...given); } catch (error) { say(error.message); } };
const number = (value, digits = 4) => value == null ? "not known" : String(Number(Number(value).toPrecision(digits)));
const told = (value) => typeof value === "number" ? number(value) : String(value);
const duration = (s) => s == null ? "not known yet" : s < 90 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`;

// ---- one picture
class Pane {
  constructor(node) {
    Object.assign(this, { node, item: null, box: null, mark: null });
    this.layers = new Map(); // name → {facts, image, opacity, on}
    this.shapes = new Map(); // name → {data, opacity, on}
    this.viewer = new OSD.Viewer({
      element: node, drawer: "canvas", showNavigationControl: false, animationTime: reduced ? 0 : 0.4,
      maxZoomPixelRatio: 16, minZoomImageRatio: 0.4, visibilityRatio: 0.2, gestureSettingsMouse: { clickToZoom: false },
      gestureSettingsTouch: { clickToZoom: false }, silenceMultiImageWarnings: true, loadTilesWithAjax: false,
      maxImageCacheCount: 300, imageLoaderLimit: 6, preserveViewport: true, preserveImageSizeOnResize: true,
    });
    this.over = el("canvas", { className: "over" });
    for (const name of ["scale", "where", "label"]) this[name] = el("div", { className: `mark ${name}` });
    node.append(this.over, this.scale, this.where, this.label);
    this.where.hidden = true;
    const on = (names, work) => names.split(" ").forEach((name) => this.viewer.addHandler(name, work));
    on("canvas-key", (event) => { event.preventDefaultAction = true; });
    on("viewport-change resize", () => this.moved());
    on("canvas-press canvas-scroll canvas-pinch", () => activate(this));
    on("canvas-drag", (event) => this.dragged(event, false));
    on("canvas-drag-end", (event) => this.dragged(event, true));
    on("tile-load-failed", ({ message }) => { if (!this.gone) say(`A tile did not come: ${message}`); });
    node.addEventListener("focus", () => activate(this));
    node.addEventListener("pointermove", (event) => this.pointed(event));
    node.addEventListener("pointerleave", () => { this.where.hidden = true; });
    new ResizeObserver(() => this.draw()).observe(node);
  }

  get size() { return { w: this.node.clientWidth, h: this.node.clientHeight }; }
  async open(id, place) {
    this.close();
    this.item = await ask(`/item/${id}`);
    this.item.layers.forEach((facts, i) => this.put(facts, i === 0 || facts.name === "before" ? 1 : 0.5, i === 0));
    this.item.overlays.forEach((name) => this.shapes.set(name, { data: null, on: false, opacity: 0.6 }));
    this.caption();
    if (place) this.go(place, true); else this.fit(true);
    if (this.item.kind === "run" && !this.item.progress.finished) this.follow();
  }
  close() {
    this.events?.close();
    this.viewer.world.removeAll();
    this.layers.clear();
    this.shapes.clear();
    Object.assign(this, { box: null, mark: null, item: null, gone: false, events: null });
  }
  caption() {
    const { synthetic, name, damaged } = this.item;
    this.label.replaceChildren(...(synthetic ? [el("b", { textContent: "Synthetic" }), " "] : []), name,
      damaged ? ` · ${damaged} damaged tile(s), shown grey` : "");
  }

  // Where a layer lies: all are one unit wide, but for coarse ones whose last px reaches beyond the picture.
  extent(facts) {
    const times = facts.name === "reference" ? this.item.width / facts.width
      : 2 ** Math.round(Math.log2(this.item.width / facts.width));
    if (!facts.box) return { x: 0, y: 0, width: facts.width * times / this.item.width };
    const [x, y, w] = facts.box.map((v) => v / this.item.width);
    return { x, y, width: w };
  }
  put(facts, opacity, on) {
    const known = this.layers.get(facts.name);
    if (known && known.facts.version === facts.version) return;
    const layer = known || { opacity, on, image: null };
    layer.facts = facts;
    this.layers.set(facts.name, layer);
    const { id } = this.item, order = [...this.layers.keys()].indexOf(facts.name), old = layer.image;
    this.viewer.addTiledImage({
      tileSource: {
        width: facts.width, height: facts.height, tileSize: facts.tile, tileOverlap: facts.overlap,
        minLevel: facts.first, maxLevel: facts.deepest,
        getTileUrl: (depth, x, y) => `/dzi/${id}/${encodeURIComponent(facts.name)}/${depth}/${x}_${y}.jpg`
          + `?v=${encodeURIComponent(facts.version)}`, // the step stands in every address
      },
      ...this.extent(facts), opacity: layer.on ? layer.opacity : 0, preload: true,
      success: ({ item: image }) => {
        if (this.item?.id !== id || layer.facts !== facts) { this.viewer.world.removeItem(image); return; }
        layer.image = image;
        this.viewer.world.setItemIndex(image, Math.min(order, this.viewer.world.getItemCount() - 1));
        image.addOnceHandler("fully-loaded-change", () => this.remove(old)); // the old one stays under it until then
        setTimeout(() => this.remove(old), 3000);
        this.moved();
      },
    });
  }
  remove(image) { if (image && this.viewer.world.getIndexOfItem(image) >= 0) this.viewer.world.removeItem(image); }
  set(name, { on, opacity }) {
    const layer = this.layers.get(name) || this.shapes.get(name);
    if (!layer) return;
    if (on !== undefined) layer.on = on;
    if (opacity !== undefined) layer.opacity = opacity;
    layer.image?.setOpacity(layer.on ? layer.opacity : 0);
    if (this.shapes.has(name) && layer.on && !layer.data) this.fetchShapes(name);
    this.draw();
  }
  fetchShapes = tried(async (name) => {
    this.shapes.get(name).data = await ask(`/overlay/${this.item.id}/${name}`);
    this.draw();
    if (name === "attention" && this === panes[0]) listTop();
  });

  // ---- a run at work
  follow() {
    const id = this.item.id;
    this.events = new EventSource(`/state?item=${id}`);
    this.events.onmessage = tried(async ({ data }) => {
      const said = JSON.parse(data);
      if (this.item?.id !== id) return;
      if (said.gone) { this.gone = true; this.events.close(); say(said.problem); return; }
      if (said.problem) { say(said.problem); return; }
      this.item.progress = said;
      const names = (layers) => layers.filter((l) => !l.box).map((l) => `${l.name} ${l.version}`).sort().join();
      if (names(said.layers) !== names([...this.layers.values()].map((l) => l.facts))) await this.renew(id);
      if (said.finished && this.layers.has("picture")) { this.events.close(); await this.renew(id); }
      if (this === panes[0]) showProgress();
    });
  }
  async renew(id) {
    const item = await ask(`/item/${id}`);
    if (this.item?.id !== id) return;
    const first = this.layers.size === 0 && item.layers.length > 0;
    this.item = item;
    const lead = item.layers[0]?.name;
    item.layers.forEach((facts, i) => this.put(facts, i ? 0.5 : 1, i === 0));
    for (const [name, layer] of [...this.layers]) { // what is no more: a preview that the picture replaced
      if (layer.facts.box || item.layers.some((facts) => facts.name === name)) continue;
      this.layers.delete(name);
      setTimeout(() => this.remove(layer.image), layer.on && lead ? 1500 : 0); // it stays until the new one is there
    }
    if (first) this.fit(true);
    this.caption();
    if (this === panes[0]) showPanel();
  }

  // ---- where it looks
  place(now = true) { // the centre, and picture px per CSS px; or where it is on the way to
    const port = this.viewer.viewport, { x, y } = port.getCenter(now), k = this.item.width;
    return { x: x * k, y: y * k, z: port.getBounds(now).width * k / Math.max(this.size.w, 1) };
  }
  go({ x, y, z }, now = false) {
    const port = this.viewer.viewport, { w, h } = this.size, known = port.getContainerSize();
    if (w && (known.x !== w || known.y !== h)) port.resize(new OSD.Point(w, h), true); // it hears of a new size late
    port.zoomTo(this.item.width / (z * Math.max(this.size.w, 1)), null, now || reduced);
    port.panTo(new OSD.Point(x / this.item.width, y / this.item.width), now || reduced);
    if (now) this.moved();
  }
  fit(now = false) {
    const { w, h } = this.size;
    const z = Math.max(this.item.width / Math.max(w, 1), this.item.height / Math.max(h, 1)) * 1.03;
    this.go({ x: this.item.width / 2, y: this.item.height / 2, z }, now);
  }
  pan(dx, dy) { // in fields
    const { x, y, z } = this.place(false);
    this.go({ x: x + dx * this.size.w * z, y: y + dy * this.size.h * z, z });
  }
  zoom(factor) { const p = this.place(false); this.go({ ...p, z: p.z / factor }); }
  moved() {
    if (!this.item) return;
    curtain(this);
    this.draw();
    if (active === this) { link(this); remember(); } else if (!linking && active.item) link(active);
  }

  pointed(event) {
    if (!this.item) return;
    const frame = this.node.getBoundingClientRect(), px = new OSD.Point(event.clientX - frame.left, event.clientY - frame.top);
    const { mpp, width, stretch: [sx, sy] } = this.item, { x, y } = this.viewer.viewport.pointFromPixel(px, true).times(width);
    const um = mpp == null ? "" : ` · ${length(x * mpp)}, ${length(y * mpp)}`;
    this.where.textContent = `x ${Math.round(x / sx)}, y ${Math.round(y / sy)} px${um}`;
    this.where.hidden = false;
  }
  dragged(event, last) {
    if (!(drawing || event.shift) && !this.from) return;
    event.preventDefaultAction = true;
    const { width, height } = this.item, point = (px) => this.viewer.viewport.pointFromPixel(px).times(width);
    if (!this.from) this.from = last ? null : point(event.position.minus(event.delta));
    if (!this.from) return;
    const at = point(event.position);
    const clip = (v, most) => Math.round(Math.min(Math.max(v, 0), most));
    const [x0, x1] = [this.from.x, at.x].sort((a, b) => a - b).map((v) => clip(v, width));
    const [y0, y1] = [this.from.y, at.y].sort((a, b) => a - b).map((v) => clip(v, height));
    this.box = [x0, y0, x1 - x0, y1 - y0];
    if (last) { this.from = null; draw(false); }
    if (this === panes[0]) showBox();
    this.draw();
  }

  // ---- drawing over it
  draw() {
    const ratio = devicePixelRatio || 1, { w, h } = this.size;
    if (!this.item || !w) return;
    Object.assign(this.over, { width: Math.round(w * ratio), height: Math.round(h * ratio) }); // this clears it, too
    const pen = this.over.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const bounds = this.viewer.viewport.getBounds(true), k = 1 / this.place().z;
    const [sx, sy] = this.item.stretch;
    const [ox, oy] = [bounds.x, bounds.y].map((v) => -v * this.item.width * k);
    const place = { kx: k * sx, ky: k * sy, ox, oy, w, h };
    for (const layer of this.shapes.values()) if (layer.on && layer.data) drawShapes(pen, layer, place);
    const outline = ([x, y, a, b], colour, p, q) => [[4, "#fff"], [2, colour]].forEach(([width, paint]) => {
      Object.assign(pen, { lineWidth: width, strokeStyle: paint });
      pen.strokeRect(place.ox + x * p, place.oy + y * q, a * p, b * q);
    });
    if (this.mark) outline(this.mark, "#000", place.kx, place.ky);
    if (this.box) outline(this.box, "#c2185b", k, k);
    this.drawScale();
  }
  drawScale() {
    const z = this.place().z, mpp = this.item.mpp;
    if (mpp == null) return this.scale.replaceChildren(this.item.kind === "run" ? "No scale yet" : NO_SCALE);
    const most = Math.min(this.size.w * 0.3, 220) * z * mpp, ten = 10 ** Math.floor(Math.log10(most));
    const bar = [5, 2, 1].map((n) => n * ten).find((v) => v <= most);
    const line = el("i");
    line.style.width = `${bar / (z * mpp)}px`;
    const power = mpp < 1000 ? ` · ${number(10 / (z * mpp), 2)}x` : "";
    this.scale.replaceChildren(line, `${length(bar)}${power}`);
    this.bar = { px: bar / (z * mpp), text: `${length(bar)}${power}` };
  }
}
function length(um) {
  const [unit, size] = [["km", 1e9], ["m", 1e6], ["mm", 1e3], ["µm", 0]].find(([, from]) => Math.abs(um) >= from);
  return `${number(um / (size || 1), 4)} ${unit}`;
}
function drawShapes(pen, { data, opacity }, { kx, ky, ox, oy, w, h }) {
  pen.save();
  pen.globalAlpha = opacity;
  const squares = (at, [a, b], paint) => at.forEach(([x, y], i) => {
    const [p, q, wide, tall] = [ox + x * kx, oy + y * ky, a * kx, b * ky];
    if (p < w && q < h && p + wide > 0 && q + tall > 0) paint(i, p, q, wide, tall);
  });
  (data.scales || []).forEach((scale, n) => {
    Object.assign(pen, n ? { strokeStyle: "#c83c14", lineWidth: 2.5 } : { strokeStyle: "#145adc", lineWidth: 1 });
    squares(scale.at, scale.tile, (_, ...box) => pen.strokeRect(...box));
  });
  if (data.ranks) {
    squares(data.at, data.tile, (i, ...box) => {
      pen.fillStyle = `hsl(${Math.round(240 - 240 * data.ranks[i])} 85% 50%)`;
      pen.fillRect(...box);
    });
  }
  for (const shape of data.shapes || []) {
    pen.beginPath();
    for (const ring of shape.rings) {
      ring.forEach(([x, y], i) => pen[i ? "lineTo" : "moveTo"](ox + x * kx, oy + y * ky));
      if (ring.length === 1) pen.arc(ox + ring[0][0] * kx, oy + ring[0][1] * ky, 4, 0, 7);
      if (shape.closed) pen.closePath();
    }
    Object.assign(pen, { strokeStyle: `rgb(${(shape.colour || [0, 150, 0]).join(" ")})`, lineWidth: 2 });
    pen.stroke();
  }
  pen.restore();
}

// ---- two pictures, one field
let panes = [], active = null, drawing = false, linking = false, rows = [];
function activate(pane) {
  if (!pane.item) return;
  active = pane;
  panes.forEach((one) => one.node.classList.toggle("active", one === pane && !panes[1].node.hidden));
}
function link(from) {
  const to = panes.find((pane) => pane !== from && pane.item);
  if (!to || !to.item.width || !from.item.width) return;
  const place = from.place(), same = from.item.mpp != null && to.item.mpp != null;
  linking = true;
  to.go({ x: place.x / from.item.width * to.item.width, y: place.y / from.item.height * to.item.height,
    z: same ? place.z * from.item.mpp / to.item.mpp : place.z * to.item.width / from.item.width }, true);
  linking = false;
}
function curtain(pane) { // the layer on top is shown left of the curtain alone
  const on = [...pane.layers.values()].filter((layer) => layer.on && layer.image && !layer.facts.box);
  const parted = on.length > 1 && on.at(-1).facts.name === "before";
  if (pane === panes[0]) $("curtain-row").hidden = !parted;
  on.forEach((layer) => layer.image.getClip() && layer.image.setClip(null));
  if (!parted) return;
  const { facts, image } = on.at(-1), bounds = pane.viewer.viewport.getBounds(true);
  const edge = (bounds.x + bounds.width * $("curtain").value / 100) * facts.width;
  image.setClip(new OSD.Rect(0, 0, Math.min(Math.max(edge, 0), facts.width), facts.height));
}

// ---- address
let waiting = 0;
function remember() { // the address restores the view
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const pane = panes[0];
    if (!pane.item || !pane.item.width) return;
    const { x, y, z } = pane.place(), words = new URLSearchParams({ item: pane.item.id });
    words.set("at", [Math.round(x), Math.round(y), Number(z.toPrecision(4))].join(","));
    const on = [...pane.layers, ...pane.shapes].filter(([, layer]) => layer.on);
    words.set("on", on.map(([name, layer]) => `${name}:${Math.round(layer.opacity * 100)}`).join(","));
    if (panes[1].item) words.set("beside", panes[1].item.id);
    if (pane.box) words.set("box", pane.box.join(","));
    history.replaceState(null, "", `#${words}`);
  }, 250);
}
const route = tried(async () => {
  clearTimeout(waiting);
  say("");
  const words = new URLSearchParams(location.hash.slice(1)), id = words.get("item");
  panes.forEach((pane) => pane.close());
  $("sheet").hidden = Boolean(id);
  $("view").hidden = $("tools").hidden = !id;
  $("synthetic").hidden = true;
  if (!id) { $("title").textContent = "ZoomLDM viewer"; await showSheet(); return; }
  const [x, y, z] = (words.get("at") || "").split(",").map(Number);
  const beside = words.get("beside");
  panes[1].node.hidden = !beside;
  active = panes[0];
  await panes[0].open(id, x >= 0 && z > 0 ? { x, y, z } : null);
  if (beside) await panes[1].open(beside, null);
  const on = new Map((words.get("on") || "").split(",").map((word) => word.split(":")));
  for (const [name] of words.get("on") ? [...panes[0].layers, ...panes[0].shapes] : []) {
    panes[0].set(name, { on: on.has(name), opacity: on.has(name) ? on.get(name) / 100 : undefined });
  }
  if (words.get("box")) panes[0].box = words.get("box").split(",").map(Number);
  activate(panes[0]);
  link(panes[0]);
  showPanel();
  panes[0].moved();
  if (!rows.length) rows = (await ask("/figures")).items;
  showOthers();
});

// ---- contact sheet
async function showSheet() {
  const said = await ask("/figures");
  rows = said.items;
  $("left-out").replaceChildren(...said.left_out.map((text) => el("li", { textContent: `Left out: ${text}` })));
  if (rows.length === 1) location.replace(`#item=${rows[0].id}`); // one picture was given: show it
  else showCards();
}
function showCards() {
  const key = $("sort").value, words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = ({ name, kind, seed, width, height, caption }) =>
    `${name} ${kind} seed=${seed} ${width}x${height} ${caption || ""}`.toLowerCase();
  const found = rows.filter((row) => words.every((word) => text(row).includes(word)));
  found.sort((a, b) => (a[key] == null) - (b[key] == null)
    || (typeof a[key] === "number" ? a[key] - b[key] : String(a[key]).localeCompare(String(b[key]))));
  $("count").textContent = `${found.length} of ${rows.length}`;
  $("cards").replaceChildren(...found.map(card));
  pairing();
}
function card(row) {
  const link = el("a", { href: `#item=${row.id}` }), list = el("dl");
  const src = `/thumb/${row.id}?v=${encodeURIComponent(row.version || "")}`;
  link.append(...(row.problem ? [] : [el("img", { src, alt: "", loading: "lazy" })]), row.name);
  for (const [key, title] of COLUMNS.slice(1)) {
    if (row[key] != null) list.append(el("dt", { textContent: title }), el("dd", { textContent: told(row[key]) }));
  }
  const note = (className, textContent) => textContent ? [el("span", { className, textContent })] : [];
  const tick = el("input", { type: "checkbox", name: "chosen", value: row.id, onchange: pairing });
  return el("li", {}, link, ...note("badge", row.synthetic && "Synthetic"), list,
    ...note("soft", row.finished === false && "not finished"), ...note("problem", row.problem), el("label", {}, tick, " compare"));
}
const chosen = () => [...document.querySelectorAll("input[name=chosen]:checked")].map((box) => box.value);
function pairing() { $("pair").disabled = chosen().length !== 2; }

// ---- panel
function showPanel() {
  const { item } = panes[0];
  $("title").textContent = item.name;
  document.title = `${item.name} · ZoomLDM viewer`;
  $("synthetic").hidden = !item.synthetic && !panes[1].item?.synthetic;
  $("power").replaceChildren(el("option", { textContent: "…", value: "" }), ...(item.mpp != null && item.mpp < 1000
    ? [40, 20, 10, 5, 2.5, 1.25, 0.625].map((p) => el("option", { value: p, textContent: `${p}x` })) : []));
  $("redo-row").hidden = item.kind !== "run";
  $("pixels").hidden = !(item.may.pixels && item.kind === "run" && !item.progress.finished);
  $("shapes-row").hidden = item.kind !== "slide";
  $("exports").replaceChildren(...item.overlays.flatMap((name) => name === "annotations" ? []
    : (name === "grid" ? ["20x", "5x"] : [name]).map((one) => el("a", { href: `/geojson/${item.id}/${one}`,
      download: `${item.name}_${one}.geojson`, textContent: `${one}.geojson` }))).flatMap((a) => [a, " "]));
  Object.assign($("report"), { hidden: !item.report, href: `/report/${item.id}` });
  const { finished, width, height, redo, ...rest } = item.figures || {};
  const facts = { ...item.facts, "px": `${item.width} x ${item.height}`,
    "µm/px": item.mpp == null ? "not stated" : number(item.mpp), ...rest, ...(redo ? { redo: redo.join(", ") } : {}) };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value != null).map(([key, value]) =>
    el("tr", {}, el("td", { textContent: (COLUMNS.find(([name]) => name === key) || [, key.replaceAll("_", " ")])[1] }),
      el("td", { textContent: told(value) }))));
  showLayers();
  showBox();
  showProgress();
  listTop();
}
function showLayers() {
  const pane = panes[0];
  $("layers").replaceChildren(...[...pane.layers, ...pane.shapes].map(([name, layer]) => {
    const title = layer.facts?.title || name;
    const on = el("input", { type: "checkbox", checked: layer.on });
    on.onchange = () => { pane.set(name, { on: on.checked }); pane.moved(); listTop(); };
    const range = el("input", { type: "range", min: 5, max: 100, ariaLabel: `opacity of ${title}` });
    range.value = Math.round(layer.opacity * 100);
    range.oninput = () => { pane.set(name, { opacity: range.value / 100 }); remember(); };
    return el("li", {}, el("div", { className: "line" }, el("label", {}, on, ` ${title}`), range));
  }));
}
function toggle(n) { document.querySelector(`#layers li:nth-child(${n}) input`)?.click(); }
function showProgress() {
  const { item } = panes[0], said = item?.progress, node = $("progress");
  node.hidden = !said || said.finished;
  if (node.hidden) return;
  const steps = said.steps || 0;
  const live = item.layers.find((layer) => layer.live)?.live, died = said.alive === false;
  const line = (text) => el("div", {}, text);
  const ago = said.age_s == null ? "" : `, ${duration(said.age_s)} ago`;
  const state = died ? "The process that made this run is gone. Run its command again to continue it."
    : live ? `Shown is x0, predicted after step ${live.step}${ago}.`
      : said.commits ? "No preview: the first step is not done, or the checkpoint has no colour map."
        : "Nothing is committed yet.";
  node.replaceChildren(el("h2", {}, died ? "Stopped" : "At work"),
    line(`pass ${said.pass_name || said.pass}, step ${said.step}${steps ? ` of ${steps}` : ""}`),
    ...(steps ? [el("progress", { max: steps, value: said.step, ariaLabel: "steps of the pass" })] : []),
    ...(said.tiles_per_s != null && !died ? [line(`${number(said.tiles_per_s, 3)} tiles/s, ${said.replicas} replica(s), `
      + `${duration(said.remaining_s)} left of this pass`)] : []),
    ...(said.decoded_px ? [line(`decoding: ${said.decoded_px} of ${said.height} rows`)] : []), line(state));
}
function listTop() {
  const layer = panes[0].shapes.get("attention"), data = layer?.on ? layer.data : null;
  $("attended").hidden = !data;
  if (!data) return;
  $("top").replaceChildren(...data.top.map((i) => {
    const [x, y] = data.at[i], [w, h] = data.tile, [sx, sy] = panes[0].item.stretch;
    const show = () => {
      panes[0].mark = [x, y, w, h];
      activate(panes[0]);
      panes[0].go({ x: (x + w / 2) * sx, y: (y + h / 2) * sy, z: w / (panes[0].size.w * 0.4) });
    };
    return el("li", {}, el("button", { type: "button", textContent: number(data.values[i], 2), onclick: show,
      title: `attention ${data.values[i]} at x ${x}, y ${y}` }));
  }));
}
function showOthers() {
  const [one, two] = panes.map((pane) => pane.item?.id);
  $("other").replaceChildren(el("option", { value: "", textContent: "nothing" }), ...rows.filter((row) => row.id !== one)
    .map((row) => el("option", { value: row.id, textContent: row.name, selected: row.id === two })));
}
function showBox() {
  const box = panes[0].box || [];
  ["bx", "by", "bw", "bh"].forEach((id, i) => { $(id).value = box[i] ?? ""; });
  $("command").hidden = $("run").hidden = true;
  for (const id of ["redo", "pixels", "box-out"]) $(id).disabled = !(box[2] > 0 && box[3] > 0);
  if (panes[0].item) remember();
}
function putBox(box) { panes[0].box = box; showBox(); panes[0].draw(); }
function draw(on) { drawing = on; $("box").setAttribute("aria-pressed", String(on)); }
const sampleAgain = tried(async () => {
  const { item, box } = panes[0];
  const said = await ask(`/redo?${new URLSearchParams({ item: item.id, box: box.join(","), seed: $("seed").value })}`);
  Object.assign($("command"), { textContent: said.command, hidden: false });
  $("run").hidden = !said.allowed;
});
const work = (path, done) => tried(async () => { // start a job on the box, show its last lines, then what it made
  const { item, box: around } = panes[0], box = around.join(",");
  let job = await ask(path, JSON.stringify({ item: item.id, box, seed: $("seed").value }));
  for (;;) {
    Object.assign($("job"), { hidden: false, textContent: [job.state, ...job.lines.slice(-4)].join("\n") });
    if (job.state === "failed" || panes[0].item?.id !== item.id) return;
    if (job.state === "done") { done(job, box); return; }
    await new Promise((resolve) => setTimeout(resolve, 700));
    job = await ask(`/job/${job.id}`);
  }
});
const runRedo = work("/redo", ({ shows }, box) => {
  const { x, y, z } = panes[0].place();
  rows = [];
  location.hash = new URLSearchParams({ item: shows, at: `${x},${y},${z}`, on: "picture:100,before:100", box });
});
const truePixels = work("/pixels", (job) => {
  panes[0].put({ ...job.layer, box: job.box }, 1, true);
  showLayers();
});
function snapshot() {
  const pane = active || panes[0], { w, h } = pane.size, ratio = devicePixelRatio || 1;
  const sheet = el("canvas", { width: Math.round(w * ratio), height: Math.round(h * ratio) }), pen = sheet.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, sheet.width, sheet.height);
  for (const part of [pane.viewer.drawer.canvas, pane.over]) pen.drawImage(part, 0, 0, sheet.width, sheet.height);
  pen.scale(ratio, ratio);
  pen.font = "14px sans-serif";
  const { item: { synthetic, name, mpp }, bar } = pane, { x, y } = pane.place();
  for (const [text, at] of [[`${synthetic ? "Synthetic · " : ""}${name}`, 22], [mpp == null ? NO_SCALE : bar.text, h - 12]]) {
    pen.fillStyle = "rgb(255 255 255 / 88%)";
    pen.fillRect(8, at - 15, pen.measureText(text).width + 8, 20);
    pen.fillStyle = "#1b2228";
    pen.fillText(text, 12, at);
  }
  if (mpp != null) pen.fillRect(12, h - 36, bar.px, 5);
  sheet.toBlob((blob) => save(blob, `${name.replace(/[^\w.-]+/g, "_")}_${Math.round(x)}_${Math.round(y)}.png`));
}
function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
function saveBox() {
  const { item, box: [x, y, w, h] } = panes[0], [sx, sy] = item.stretch;
  const ring = [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]].map(([a, b]) => [a / sx, b / sy]);
  const feature = { type: "Feature", geometry: { type: "Polygon", coordinates: [ring] },
    properties: { objectType: "annotation", name: `box ${x},${y}` } };
  save(new Blob([JSON.stringify({ type: "FeatureCollection", features: [feature] })]), "box.geojson");
}
const showFile = tried(async () => {
  const [file] = $("geojson").files;
  if (!file) return;
  if (file.size > LARGEST_GEOJSON) throw new Error(`${file.name} must have at most 32 MiB; it has more.`);
  const data = await ask("/geojson", file);
  panes[0].shapes.set(file.name, { data, on: true, opacity: 1 });
  say(data.skipped ? `${data.skipped} geometries of ${file.name} cannot be drawn and were left out.` : "");
  showLayers();
  panes[0].draw();
});

// ---- hands
const KEYS = {
  ArrowLeft: () => active.pan(-0.2, 0), ArrowRight: () => active.pan(0.2, 0), ArrowUp: () => active.pan(0, -0.2),
  ArrowDown: () => active.pan(0, 0.2), "+": () => active.zoom(1.5), "=": () => active.zoom(1.5), "-": () => active.zoom(0.67),
  0: () => active.fit(), b: () => draw(!drawing), s: snapshot, f: () => $("full").click(), "?": () => $("keys").click(),
  Escape: () => { draw(false); panes[0].mark = null; putBox(null); },
};
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !active?.item || $("view").hidden || $("help").open) return;
  if (event.target.closest("input:not([type=checkbox]), select, textarea, dialog")) return;
  const known = /^[1-9]$/.test(event.key) ? () => toggle(event.key) : KEYS[event.key];
  if (known) { event.preventDefault(); known(); }
}
function begin() {
  panes = [new Pane($("stage-a")), new Pane($("stage-b"))];
  active = panes[0];
  $("sort").replaceChildren(...COLUMNS.map(([key, title]) => el("option", { value: key, textContent: title })));
  $("sort").onchange = $("filter").oninput = showCards;
  $("sift").onsubmit = $("region").onsubmit = (event) => event.preventDefault();
  $("pair").onclick = () => { const [a, b] = chosen(); location.hash = `item=${a}&beside=${b}`; };
  $("other").onchange = tried(async () => {
    const id = $("other").value;
    panes[1].close();
    panes[1].node.hidden = !id;
    if (id) await panes[1].open(id, null);
    activate(panes[0]);
    panes[0].viewer.forceResize();
    setTimeout(() => { link(panes[0]); showPanel(); showOthers(); remember(); }, 0);
  });
  $("fit").onclick = () => active.fit();
  $("power").onchange = () => {
    if ($("power").value) active.go({ ...active.place(false), z: 10 / Number($("power").value) / active.item.mpp });
    $("power").value = "";
  };
  $("box").onclick = () => draw(!drawing);
  $("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("stages").requestFullscreen());
  $("keys").onclick = () => $("help").showModal();
  $("curtain").oninput = () => curtain(panes[0]);
  $("from-view").onclick = () => {
    const { item } = panes[0], p = panes[0].place(false), side = Math.min(256, item.width, item.height);
    const at = (c, most) => Math.round(Math.min(Math.max(c - side / 2, 0), most - side));
    putBox([at(p.x, item.width), at(p.y, item.height), side, side]);
  };
  for (const [i, id] of ["bx", "by", "bw", "bh"].entries()) {
    $(id).onchange = () => {
      const value = Math.max(0, Math.round(Number($(id).value)) || 0);
      putBox(Object.assign(panes[0].box || [0, 0, 256, 256], { [i]: value }));
    };
  }
  Object.entries({ redo: sampleAgain, run: runRedo, pixels: truePixels, "box-out": saveBox, snap: snapshot })
    .forEach(([id, act]) => { $(id).onclick = act; });
  $("geojson").onchange = showFile;
  document.addEventListener("keydown", pressed);
  window.addEventListener("hashchange", route);
  window.viewerPanes = panes; // for tests and the curious
  route();
}
begin();
