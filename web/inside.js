// The view "Inside": the schedule, and the channels of a block of the network.

const SVG = "http://www.w3.org/2000/svg", CHART = {left: 36, right: 588, top: 12, bottom: 178};
const NEGATIVE = [64, 128, 255], POSITIVE = [255, 150, 40];

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// alpha and sigma over t, which falls to the right as in the other views; the steps of the sampler; the shown one.
function showSchedule() {
  const {process} = app, last = process.numTimesteps - 1, {left, right, top, bottom} = CHART;
  const place = (t, value) =>
    [right - Math.max(t, 0) / Math.max(1, last) * (right - left), bottom - value * (bottom - top)];
  const curve = (value) => Array.from({length: 101}, (_, i) => place(i / 100 * last, value(i / 100 * last))
    .map((number) => number.toFixed(1)).join(",")).join(" L");
  const alpha = (t) => t < 0 ? 1 : process.alpha(t), sigma = (t) => t < 0 ? 0 : process.sigma(t);
  const now = film.frames[film.at]?.t ?? -1, [x] = place(now, 0);
  const text = (x, y, content, attributes = {}) => svg("text", {x, y, ...attributes}, content);
  const chart = svg("svg", {viewBox: "0 0 600 214", role: "img", "aria-label":
    `From t = ${last} to 0 the share of the noise, sigma, falls from ${round(sigma(last))} to ${round(sigma(0))}, ` +
    `and that of the image, alpha, rises from ${round(alpha(last))} to ${round(alpha(0))}`});
  for (const value of [0, 0.5, 1]) {
    const y = place(0, value)[1];
    chart.append(svg("line", {x1: left, x2: right, y1: y, y2: y}),
                 text(left - 8, y + 4, value, {"text-anchor": "end"}));
  }
  for (const t of new Set([0, last / 2, last]))
    chart.append(text(place(t, 0)[0], bottom + 18, t === last / 2 ? "time t" : t, {"text-anchor": "middle"}));
  chart.append(svg("path", {class: "signal", d: `M${curve(alpha)}`}),
               svg("path", {class: "noise", d: `M${curve(sigma)}`}),
               text(...place(0.03 * last, 0.84), "α image", {class: "signal", "text-anchor": "end"}),
               text(...place(0.97 * last, 0.84), "σ noise", {class: "noise"}),
               svg("line", {class: "now", x1: x, x2: x, y1: top, y2: bottom}));
  for (const [i, {t}] of film.frames.entries())
    chart.append(svg("circle", {r: 4, cx: place(t, 0)[0], cy: place(t, alpha(t))[1],
                                class: i === film.at ? "now" : ""}));
  $("schedule").replaceChildren(chart);
}

// The blocks of the U from left to right: {name, level, channels, text}; level 0 has the highest resolution.
function blocksOf({network, tensors}) {
  const shapes = new Map(tensors), levels = network.channel_mults.length - 1;
  const width = (level) => network.base_channels * network.channel_mults[level];
  const outputs = shapes.get("head.2.weight")[0];
  return [
    {name: "stem", level: 0, channels: width(0), text: "stem"},
    ...Array.from({length: levels}, (_, i) => ({name: `downs.${i}`, level: i, channels: width(i), text: "down"})),
    {name: "middle", level: levels, channels: width(levels), text: "middle"},
    ...Array.from({length: levels}, (_, i) => ({name: `ups.${i}`, level: levels - 1 - i,
                                                channels: width(levels - 1 - i), text: "up"})),
    {name: "head", level: 0, channels: outputs, text: "head"},
  ];
}

function showNetwork(entry) {
  const blocks = blocksOf(entry), [, height, width] = entry.shape, levels = entry.network.channel_mults.length;
  $("unet").style.gridTemplateColumns = `repeat(${blocks.length}, minmax(0, 1fr))`;
  $("unet").replaceChildren(...blocks.map(({name, level, channels, text}, column) => {
    const [high, wide] = [height, width].map((size) => size / entry.network.patch_size / 2 ** level);
    const button = element("button", {name, role: "radio", "aria-checked": "false"}, element("canvas"), text,
                           element("small", {}, `${channels} × ${high === wide ? `${high}²` : `${high} × ${wide}`}`));
    button.style.gridArea = `${level + 1} / ${column + 1}`;
    button.style.setProperty("--share", 0.5 ** level);
    button.addEventListener("click", () => {
      app.setState({block: name});
      look();
    });
    return button;
  }));
  for (let level = 0; level < levels - 1; level++) {
    const skip = element("div", {className: "skip"});
    skip.style.gridArea = `${level + 1} / ${level + 3} / auto / ${2 * levels - level}`;
    $("unet").append(skip);
  }
}

// The channels of the chosen block at the shown step, in a grid.
function look() {
  const {block} = app.state, frame = film.frames[film.at];
  for (const button of $("unet").querySelectorAll("button")) {
    button.setAttribute("aria-checked", button.name === block);
    button.tabIndex = button.name === block ? 0 : -1;
  }
  if (frame) examine();
}

const examine = oneAtATime(async () => {
  const {block, label, model} = app.state, frame = film.frames[film.at];
  if (!frame) return;
  const t = Math.max(frame.t, 0);
  await app.engine.ask("look", "look", {model, x: frame.x, t, label}, ({tensors}) => {
    const tensor = tensors[block];
    for (const button of $("unet").querySelectorAll("button"))
      showChannels(button.firstElementChild, tensors[button.name], [liveliest(tensors[button.name])]);
    showChannels($("channels"), tensor, Array.from({length: tensor.channels}, (_, c) => c));
    $("channels").setAttribute("role", "img");
    $("channels").setAttribute("aria-label", `${tensor.channels} channels of the block ${block}`);
    $("channels-text").textContent = `${tensor.channels} channels of ${tensor.height} × ${tensor.width} at ` +
      `t = ${t.toFixed(0)}; each has its own scale.`;
  });
});

// The channel whose values differ most between the pixels.
function liveliest({data, channels}) {
  const squares = new Float64Array(channels), sums = new Float64Array(channels), count = data.length / channels;
  data.forEach((value, i) => {
    sums[i % channels] += value;
    squares[i % channels] += value ** 2;
  });
  const variances = squares.map((square, c) => square / count - (sums[c] / count) ** 2);
  return variances.indexOf(Math.max(...variances));
}

// Draw the chosen channels of a tensor in a grid, each with its own scale.
function showChannels(canvas, {data, channels, height, width}, chosen) {
  let columns = Math.ceil(Math.sqrt(1.6 * chosen.length));
  while (chosen.length % columns && columns ** 2 < 4 * chosen.length) columns++;  // for full rows, if that can be
  const rows = Math.ceil(chosen.length / columns), across = Math.min(columns, chosen.length);
  [canvas.width, canvas.height] = [across * (width + 1) - 1, rows * (height + 1) - 1];
  const context = canvas.getContext("2d");
  for (const [place, c] of chosen.entries()) {
    const pixels = new ImageData(width, height);
    let largest = 1e-9;
    for (let i = c; i < data.length; i += channels) largest = Math.max(largest, Math.abs(data[i]));
    for (let pixel = 0; pixel < width * height; pixel++) {
      const value = data[pixel * channels + c] / largest, colour = value < 0 ? NEGATIVE : POSITIVE;
      for (let k = 0; k < 3; k++) pixels.data[4 * pixel + k] = 20 + Math.abs(value) * (colour[k] - 20);
      pixels.data[4 * pixel + 3] = 255;
    }
    context.putImageData(pixels, place % columns * (width + 1), Math.floor(place / columns) * (height + 1));
  }
}

const insideView = {
  start() {
    $("inside-step").addEventListener("input", () => scrubTo(Number($("inside-step").value)));
    arrowKeys($("unet"));
  },

  build(entry) { showNetwork(entry); },

  open() { this.frameChanged(); },

  // Another step is shown.
  frameChanged() {
    const frame = film.frames[film.at];
    if (app.state.view !== "inside" || !frame) return;
    showSchedule();
    paint($("inside-x"), app.code.decode(frame.x), app.entry.shape, "The image at this step");
    $("inside-t").textContent = frame.t < 0 ? "the image" : `t = ${frame.t.toFixed(0)}`;
    look();
  },
};
