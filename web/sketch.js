// The view "Draw": a drawing, the drawing with noise, what the network sees in it; and completions of half a drawing.

const PENS = {thin: 0.8, medium: 1.3, thick: 2.2};  // radius in pixels of an image 28 pixels high
const PROPOSALS = 4, COMPLETE_STEPS = 20, RESAMPLE = 5, NOISE_SEED = 1;

// levels: the drawing; paper: the level where nothing is drawn; cursor, down: the pen of the keyboard; completing:
// whether proposals are being made. What else there is stands in the state of the page.
const sketch = {levels: null, paper: 0, pen: "medium", cursor: null, down: false, completing: false};

// The parts that can be kept: whether a pixel belongs to it.
const HALVES = {
  left: (x, y, width) => x < width >> 1,
  right: (x, y, width) => x >= width >> 1,
  top: (x, y, width, height) => y < height >> 1,
  bottom: (x, y, width, height) => y >= height >> 1,
};

// Draw a line with round ends from one point to another, each [x, y] in pixels, with a soft edge.
function drawLine([x0, y0], [x1, y1]) {
  const [channels, height, width] = app.entry.shape, {levels, pen, paper} = sketch;
  const radius = (PENS[pen] ?? 2 * PENS.thick) * height / 28, length = (x1 - x0) ** 2 + (y1 - y0) ** 2;
  const erase = pen === "eraser", apart = (level) => Math.abs(level - paper);
  const mix = (level, colour, cover) => Math.round(level + cover * (colour - level));
  const chosen = [1, 3, 5].map((i) => parseInt($("ink").value.slice(i, i + 2), 16));
  const ink = channels > 1 ? chosen : [paper < 128 ? 255 : 0];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const [px, py] = [x + 0.5 - x0, y + 0.5 - y0];
      const along = length ? Math.min(1, Math.max(0, (px * (x1 - x0) + py * (y1 - y0)) / length)) : 0;
      const distance = Math.hypot(px - along * (x1 - x0), py - along * (y1 - y0));
      const cover = Math.min(1, Math.max(0, radius + 0.5 - distance));
      for (let c = 0, i = y * width + x; cover && c < channels; c++, i += width * height) {
        if (erase || channels > 1) {
          levels[i] = mix(levels[i], erase ? paper : ink[c], cover);
        } else {
          const stroke = mix(paper, ink[c], cover);
          if (apart(stroke) > apart(levels[i])) levels[i] = stroke;  // the soft edges of a stroke do not add up
        }
      }
    }
}

// A drawing as a text for the address: its levels XOR that of the paper, 0 with the length of its run behind it.
function packDrawing(drawing, paper) {
  const bytes = [], levels = drawing.map((level) => level ^ paper);
  for (let i = 0; i < levels.length;) {
    let run = 0;
    while (levels[i + run] === 0 && run < 255) run++;
    bytes.push(...run ? [0, run] : [levels[i]]);
    i += run || 1;
  }
  const text = btoa(bytes.map((byte) => String.fromCharCode(byte)).join(""));
  return text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// The `count` levels of such a text; undefined if it is of another size or no such text.
function unpackDrawing(text, count, paper) {
  try {
    const bytes = bytesOf(text.replaceAll("-", "+").replaceAll("_", "/")), levels = [];
    for (let i = 0; i < bytes.length && levels.length <= count; i++)
      levels.push(...bytes[i] ? [bytes[i]] : Array(bytes[++i] ?? 0).fill(0));
    return levels.length === count ? Uint8Array.from(levels, (level) => level ^ paper) : undefined;
  } catch {
    return undefined;
  }
}

function drawingChanged() {
  app.setState({drawing: sketch.levels});
  paint($("pad"), sketch.levels, app.entry.shape);
  showCursor();
  guess();
}

// The pen of the keyboard, as a mark on the drawing.
function showCursor() {
  if (!sketch.cursor || document.activeElement !== $("pad")) return;
  const context = $("pad").getContext("2d"), [x, y] = sketch.cursor;
  context.fillStyle = sketch.down ? "#f0a05a" : "#8fb0ff";
  context.fillRect(Math.floor(x), Math.floor(y), 1, 1);
}

const guess = oneAtATime(async () => {
  const start = performance.now(), {model, t, told: label} = app.state, {shape} = app.entry;
  const x0 = app.code.encode(sketch.levels);
  await app.engine.ask("guess", "guess", {model, x0, t, label, seed: NOISE_SEED}, ({x, x0}) => {
    paint($("sketch-x"), app.code.decode(x), shape, `The drawing with noise, t = ${t}`);
    paint($("sketch-x0"), app.code.decode(x0), shape, "What the network sees in it");
    showMixture($("guess-told"), t);
    $("guess-told").append(` (answered in ${Math.round(performance.now() - start)} ms)`);
  });
});

async function complete() {
  const [channels, height, width] = app.entry.shape, {state, entry, code} = app, {told: label, keep} = state;
  const mask = Uint8Array.from({length: channels * height * width}, (_, i) =>
    HALVES[keep](i % width, Math.floor(i / width) % height, width, height) ? 0 : 1);
  const seed = randomSeed(), start = performance.now();
  sketch.completing = true;
  $("proposals").replaceChildren(...Array.from({length: PROPOSALS}, (_, i) =>
    element("figure", {}, element("canvas", {id: `proposal-${i}`}))));
  const done = await app.engine.ask("complete", "complete", {
    model: state.model, known: code.encode(sketch.levels), mask, label, guidance: state.guidance, seed, steps:
    Math.min(COMPLETE_STEPS, app.process.numTimesteps), resample: RESAMPLE, count: PROPOSALS}, ({index, x, share}) => {
    paint($(`proposal-${index}`), code.decode(x), entry.shape, `Proposal ${index + 1}`);
    if (!index) $("complete-told").textContent = share < 1 ? `${Math.round(100 * share)} %` : "";
  });
  if (!done) return;
  sketch.completing = false;
  $("complete-told").textContent = `Four proposals that keep your ${keep} half, in ` +
    `${round((performance.now() - start) / 1000, 1)} seconds.`;
}

const sketchView = {
  start() {
    const pad = $("pad");
    let last = null;
    const place = (event) => {
      const box = pad.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width * pad.width, (event.clientY - box.top) / box.height * pad.height];
    };
    pad.addEventListener("pointerdown", (event) => {
      if (event.button || !event.isPrimary) return;
      pad.setPointerCapture(event.pointerId);
      last = place(event);
      this.lift();
      drawLine(last, last);
      drawingChanged();
    });
    pad.addEventListener("pointermove", (event) => {
      if (!last || !event.isPrimary) return;
      if (!event.buttons) return void (last = null);  // lifted where the page could not see it
      const all = event.getCoalescedEvents?.() ?? [];  // Firefox for Android gives none of them
      for (const each of all.length ? all : [event]) drawLine(last, last = place(each));
      drawingChanged();
    });
    for (const end of ["pointerup", "pointercancel"])
      pad.addEventListener(end, (event) => { if (event.isPrimary) last = null; });
    pad.addEventListener("keydown", (event) => this.key(event));
    pad.addEventListener("blur", () => {
      this.lower(false);
      paint(pad, sketch.levels, app.entry.shape);  // without the mark of the pen
    });
    $("clear").addEventListener("click", () => {
      sketch.levels.fill(sketch.paper);
      drawingChanged();
    });
    $("take").addEventListener("click", () => this.take());
    $("complete").addEventListener("click", complete);
    choices($("pens"), [...Object.keys(PENS), "eraser"].map((name) => [name, name]), (pen) => { sketch.pen = pen; })
      .set(sketch.pen);
    this.keep = choices($("halves"), Object.keys(HALVES).map((name) => [name, name]), (keep) => app.setState({keep}));
  },

  // Arrow keys move the pen by a pixel; the space bar lowers and lifts it.
  key(event) {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0]}[event.key];
    if (!move || withModifier(event)) return;
    event.preventDefault();
    if (event.key === " " && event.repeat) return;
    const [, height, width] = app.entry.shape, from = sketch.cursor ?? [width / 2 + 0.5, height / 2 + 0.5];
    const limit = (value, size) => Math.min(size - 0.5, Math.max(0.5, value));
    sketch.cursor = [limit(from[0] + move[0], width), limit(from[1] + move[1], height)];
    if (event.key === " ") this.lower(!sketch.down);
    if (sketch.down) drawLine(from, sketch.cursor);
    drawingChanged();
  },

  // Lower or lift the pen of the keyboard, and say so to a screen reader.
  lower(down) {
    if (down !== sketch.down) $("pen-told").textContent = `The pen is ${down ? "down" : "up"}.`;
    sketch.down = down;
  },

  // Put the pen of the keyboard away.
  lift() {
    sketch.cursor = null;
    this.lower(false);
  },

  take() {
    const x = film.frames.at(-1)?.x;
    if (!film.done || !x) return;
    sketch.levels = app.code.decode(x);
    drawingChanged();
  },

  build({shape: [channels, height, width], class_names: names, student, guided}) {
    const paper = app.code.paper();
    if (paper !== sketch.paper) $("ink").value = paper < 128 ? "#ffffff" : "#000000";
    sketch.paper = paper;
    sketch.levels = new Uint8Array(channels * height * width).fill(paper);
    this.lift();
    $("ink-field").hidden = channels === 1;
    $("completion").hidden = student;  // a student only makes images from pure noise
    this.told = labelChoices($("sketch-labels"), names, guided ? "nothing" : null, (told) => {
      app.setState({told});
      guess();
    });
    $("noise-slider").replaceChildren();
    const max = app.process.numTimesteps - 1;
    this.t = slider($("noise-slider"), {name: "Noise: time t", min: 0, max, value: 0}, (t) => {
      app.setState({t});
      guess();
    });
    $("proposals").replaceChildren();
    $("complete-told").textContent = "";
    paint($("pad"), sketch.levels, app.entry.shape);
  },

  // Put the state into the controls.
  show({t, told, keep}) {
    this.t.set(t);
    this.told.set(told);
    this.keep.set(keep);
    $("pad").parentElement.dataset.keep = keep;
  },

  // The drawing of the address; without one, the image that was made, or that will be.
  open() {
    if (!app.state.drawing) return this.take();
    sketch.levels = app.state.drawing;
    drawingChanged();
  },

  // Another view needs the worker now.
  close() {
    if (!sketch.completing) return;
    sketch.completing = false;
    app.engine.ask("complete", "nothing", {});
    $("proposals").replaceChildren();
    $("complete-told").textContent = "";
  },

  filmChanged() { if (!app.state.drawing) this.take(); },
};
