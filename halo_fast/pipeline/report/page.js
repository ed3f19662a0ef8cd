"use strict";
// Clips are loaded when they come into view and let go when they leave it: browsers refuse to hold hundreds of players.
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const STEP = 24;
let cards = [];
let rows = new Map();
let listed = new Map();
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let limit = STEP;
let chosen = [];
let ticking = false;

function prepare(card) {
  card.screens = all(".screen", card).map((screen) => {
    const numbers = (name) => screen.dataset[name].split(" ").map(Number);
    const canvas = document.createElement("canvas");
    canvas.setAttribute("aria-hidden", "true");
    const image = screen.querySelector("img");
    screen.querySelector(".stage").append(canvas);
    canvas.height = 320;
    canvas.width = Math.round((320 * image.getAttribute("width")) / image.getAttribute("height"));
    return { screen, canvas, layers: numbers("layers"), grid: numbers("grid"), severity: numbers("severity"), fps: Number(screen.dataset.fps) };
  });
  card.frames = Math.min(...card.screens.map(({ layers }) => layers.length));
  card.paused = false;
  const [button, slider] = [card.querySelector(".player button"), card.querySelector(".player input")];
  slider.max = card.frames - 1;
  slider.oninput = () => { pause(card, true); seek(card, Number(slider.value)); };
  button.onclick = () => (card.paused || !playing ? resume(card) : pause(card, true));
  show(card, 0);
}

function layerOf(one, frame) {
  const [layers, height, width] = one.grid;
  const start = one.layers[frame] * height * width;
  return one.severity.slice(start, start + height * width).map((value) => value / 100);
}

function paint(one, frame) {
  const { canvas, grid } = one;
  if (canvas.painted === one.layers[frame]) return;
  canvas.painted = one.layers[frame];
  const pen = canvas.getContext("2d");
  const [, height, width] = grid;
  const edge = (place, count, length) => Math.floor((place * length) / count);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  layerOf(one, frame).forEach((value, place) => {
    const [row, column] = [Math.floor(place / width), place % width];
    const [left, top] = [edge(column, width, canvas.width), edge(row, height, canvas.height)];
    const [wide, high] = [edge(column + 1, width, canvas.width) - left, edge(row + 1, height, canvas.height) - top];
    pen.globalAlpha = 0.7 * value;
    pen.fillStyle = "#f0a000";
    pen.fillRect(left, top, wide, high);
    if (value > DEFECTIVE) {
      pen.globalAlpha = 1;
      pen.setLineDash([7, 5]);
      pen.lineWidth = 3;
      pen.strokeStyle = "#fff";
      pen.strokeRect(left + 2, top + 2, wide - 4, high - 4);
    }
  });
}

function show(card, frame) {
  card.frame = frame;
  card.screens.forEach((one) => paint(one, frame));
  const slider = card.querySelector(".player input");
  slider.value = frame;
  const counts = card.screens.map((one) => layerOf(one, frame).filter((value) => value > DEFECTIVE).length);
  card.querySelector(".player span").textContent = `frame ${frame + 1} of ${card.frames}`;
  const said = card.screens.map((one, index) => `${one.screen.dataset.label} ${counts[index]} patches defective`);
  slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${card.frames}: ${said.join(", ")}`);
}

function seek(card, frame) {
  card.videos?.forEach((video, index) => { video.currentTime = (frame + 0.5) / card.screens[index].fps; });
  show(card, frame);
}

function label(card) {
  const runs = playing && !card.paused;
  const button = card.querySelector(".player button");
  button.textContent = runs ? "Pause" : "Play";
  button.setAttribute("aria-label", `${runs ? "Pause" : "Play"}: ${card.querySelector(".prompt").textContent}`);
}

function pause(card, itself) {
  if (itself) card.paused = true;
  card.videos?.forEach((video) => video.pause());
  label(card);
}

function resume(card) {
  card.paused = false;
  if (!playing) playAll(true, card);
  start(card);
}

function start(card) {
  label(card);
  if (!card.videos || card.paused || !playing) return;
  card.videos.forEach((video) => video.play().catch(() => {}));
  if (!ticking) requestAnimationFrame(tick);
  ticking = true;
}

// one clip leads; the others follow it, and so does the slider
function tick() {
  const running = cards.filter((card) => card.videos && !card.paused && playing);
  running.forEach((card) => {
    const [lead, ...others] = card.videos;
    if (lead.readyState < 2) return;
    const fps = card.screens[0].fps;
    others.forEach((video) => {
      const apart = Math.abs(video.currentTime - lead.currentTime);
      const gap = Math.min(apart, Math.abs(lead.duration - apart));
      if (gap > 0.75 / fps && !video.seeking) video.currentTime = lead.currentTime;
    });
    const frame = Math.min(card.frames - 1, Math.floor(lead.currentTime * fps + 0.01));
    if (frame !== card.frame) show(card, frame);
  });
  ticking = running.length > 0;
  if (ticking) requestAnimationFrame(tick);
}

function fill(card) {
  if (card.videos) return;
  if (!card.screens) prepare(card);
  card.videos = card.screens.map(({ screen, canvas }) => {
    const video = document.createElement("video");
    Object.assign(video, { muted: true, loop: true, playsInline: true, preload: "auto" });
    video.setAttribute("aria-label", `${screen.dataset.label}: ${card.querySelector(".prompt").textContent}`);
    video.src = `data:video/mp4;base64,${screen.querySelector("script").textContent}`;
    canvas.before(video);
    return video;
  });
  seek(card, card.frame);
  start(card);
}

function empty(card) {
  if (!card.videos || card.contains(document.activeElement)) return;
  card.videos.forEach((video) => { video.pause(); video.removeAttribute("src"); video.load(); video.remove(); });
  card.videos = null;
}

const watcher = new IntersectionObserver(
  (entries) => entries.forEach(({ target, isIntersecting }) => (isIntersecting ? fill(target) : empty(target))),
  { rootMargin: "200px" },
);

function playAll(wanted, except) {
  playing = wanted;
  byId("pause").textContent = playing ? "Pause all" : "Play all";
  cards.forEach((card) => {
    if (!card.screens) return;
    if (card !== except) card.paused = false;
    if (playing) start(card); else pause(card, false);
  });
}

const ORDERS = {
  list: (a, b) => listed.get(a) - listed.get(b),
  prompt: (a, b) => promptOf(a).localeCompare(promptOf(b)),
  best: (a, b) => b.dataset.margin - a.dataset.margin,
  worst: (a, b) => a.dataset.margin - b.dataset.margin,
  defects: (a, b) => b.dataset.defects - a.dataset.defects,
};
const promptOf = (card) => card.querySelector(".prompt").textContent;

function matches(card) {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("kind")?.value;
  const outcome = byId("outcome").value;
  const margin = Number(card.dataset.margin);
  return words.every((word) => promptOf(card).toLowerCase().includes(word))
    && (!kind || JSON.parse(card.dataset.kinds).includes(kind))
    && (!outcome || (outcome === "better" ? margin > 0 : margin < 0));
}

function choose() {
  chosen = cards.filter(matches).sort(ORDERS[byId("order").value]);
  limit = STEP;
  const left = cards.filter((card) => !chosen.includes(card));
  document.querySelector(".clips").append(...chosen, ...left);
  document.querySelector("#rows tbody").append(...[...chosen, ...left].map((card) => rows.get(card.id)));
  cut();
}

// shows the first `limit` of the chosen cards
function cut() {
  const shown = new Set(chosen.slice(0, limit));
  const kept = new Set(chosen);
  cards.forEach((card) => {
    card.hidden = !shown.has(card);
    rows.get(card.id).hidden = !kept.has(card);
  });
  byId("count").textContent = `${chosen.length} of ${cards.length} prompts, ${shown.size} shown`;
  const more = byId("more");
  more.hidden = shown.size === chosen.length;
  more.textContent = `Show ${Math.min(STEP, chosen.length - shown.size)} more`;
}

// a link to a clip further down shows it
function reveal() {
  const card = cards.find((one) => `#${one.id}` === location.hash);
  if (!card) return;
  if (!chosen.includes(card)) { document.querySelector(".controls").reset(); choose(); }
  if (card.hidden) { limit = chosen.indexOf(card) + 1; cut(); }
  card.scrollIntoView();
  card.focus({ preventScroll: true });
}

// called among the clips too, so that the first of them play while the rest of the page is still being read
function wake() {
  const known = new Set(cards);
  cards = chosen = all(".clip");
  cards.filter((card) => !known.has(card)).forEach((card) => watcher.observe(card));
  playAll(playing);
}

function finish() {
  wake();
  rows = new Map(all("#rows tbody tr").map((row) => [row.querySelector("a").hash.slice(1), row]));
  listed = new Map(cards.map((card, number) => [card, number]));
  const form = document.querySelector(".controls");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.id === "heat") document.body.classList.toggle("bare", !event.target.checked);
    else choose();
  });
  byId("pause").onclick = () => playAll(!playing);
  byId("more").onclick = () => {
    const first = chosen[limit];
    limit += STEP;
    cut();
    first?.focus({ preventScroll: true });
  };
  addEventListener("hashchange", reveal);
  // the same link may be followed twice
  all("#rows a").forEach((link) => link.addEventListener("click", () => { if (link.hash === location.hash) reveal(); }));
  addEventListener("beforeprint", () => {
    all("details").forEach((details) => { details.open = true; });
    // posters are printed, which are first frames
    chosen.slice(0, limit).forEach((card) => {
      if (!card.screens) prepare(card);
      card.screens.forEach((one) => paint(one, 0));
    });
  });
  addEventListener("afterprint", () => cards.forEach((card) => card.screens?.forEach((one) => paint(one, card.frame))));
  cut();
  reveal();
}
