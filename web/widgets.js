// Small pieces of the page: elements, pictures, sliders, choices. Text only ever goes in as text.

const $ = (id) => document.getElementById(id);

// An element with properties, attributes (those with a dash, and role) and children, which may be texts.
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties))
    if (key.includes("-") || key === "role") made.setAttribute(key, value); else made[key] = value;
  made.append(...children);
  return made;
}

// Show levels (C, H, W) of 0 to 255 on a canvas; label says to a screen reader what they are.
function paint(canvas, levels, [channels, height, width], label) {
  const pixels = new ImageData(width, height), count = width * height;
  for (let i = 0; i < count; i++)
    for (let c = 0; c < 4; c++)
      pixels.data[4 * i + c] = c === 3 ? 255 : levels[(channels === 1 ? 0 : c) * count + i];
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  if (label) {
    if (!canvas.hasAttribute("role")) canvas.setAttribute("role", "img");
    if (canvas.getAttribute("role") === "img") canvas.setAttribute("aria-label", label);
  }
}

// A slider with its name and value above; shown(value) -> the text of the value.
function slider(parent, {name, min, max, step = 1, value, shown = String}, changed) {
  const output = element("output");
  const input = element("input", {type: "range", min, max, step, value, "aria-label": name});
  const set = (number) => {
    input.value = number;
    output.textContent = shown(Number(number));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    set(input.value);
    changed(Number(input.value));
  });
  set(value);
  parent.append(element("label", {className: "slider"}, element("span", {}, name, output), input));
  return {input, set};
}

// Put one choice for each [value, text] into a fieldset, below its legend; set(value) chooses one.
function choices(fieldset, options, changed) {
  fieldset.replaceChildren(fieldset.firstElementChild);
  const inputs = options.map(([value, text]) => {
    const input = element("input", {type: "radio", name: fieldset.id});
    input.addEventListener("change", () => changed(value));
    fieldset.append(element("label", {}, input, element("span", {}, text)));
    return [value, input];
  });
  return {set: (chosen) => inputs.forEach(([value, input]) => { input.checked = value === chosen; })};
}

// The choice of a class, or of none where that has a text; hidden where there are no classes.
function labelChoices(fieldset, names, none, changed) {
  fieldset.hidden = !names.length;
  return choices(fieldset, [...none ? [[null, none]] : [], ...names.map((name, i) => [i, name])], changed);
}

// Whether a key belongs to the browser, as in Alt and the left arrow.
const withModifier = ({altKey, ctrlKey, metaKey}) => altKey || ctrlKey || metaKey;

// Arrow keys, Home and End go to another of the buttons in an element, and press it.
function arrowKeys(parent) {
  parent.addEventListener("keydown", (event) => {
    const buttons = [...parent.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    const [back, forth] = [at - 1, (at + 1) % buttons.length];
    const next = {ArrowLeft: back, ArrowUp: back, ArrowRight: forth, ArrowDown: forth, Home: 0, End: -1}[event.key];
    if (next === undefined || at < 0 || withModifier(event)) return;
    event.preventDefault();
    const button = buttons.at(next);
    button.focus();
    button.click();
  });
}

// Fill a strip with small canvases that have these numbers; clicked(number). Returns them.
function fillStrip(strip, numbers, clicked) {
  strip.replaceChildren(...numbers.map((number) => {
    const canvas = element("canvas", {number});
    canvas.addEventListener("click", () => clicked(number));
    return canvas;
  }));
  return [...strip.children];
}

// Mark the one with this number.
function markNow(strip, number) {
  for (const canvas of strip.children) canvas.classList.toggle("now", canvas.number === number);
}

const randomSeed = () => Math.floor(Math.random() * 1e6);

// A whole number from a field, within its bounds.
const wholeNumber = (input) => Math.min(Number(input.max), Math.max(0, Math.floor(Number(input.value)) || 0));

// Put a number into a field, unless what is typed there stands for it already.
const setNumber = (input, number) => {
  if (document.activeElement !== input || wholeNumber(input) !== number) input.value = number;
};

// Call changed(number) whenever something is typed into a field; what is left there at the end is the number.
function numberField(input, changed) {
  input.addEventListener("input", () => changed(wholeNumber(input)));
  input.addEventListener("change", () => { input.value = wholeNumber(input); });
}

// Call `work` at most once for each picture of the screen, with the newest arguments.
function onFrame(work) {
  let newest = null;
  return (...args) => {
    if (!newest) requestAnimationFrame(() => {
      const now = newest;
      newest = null;
      work(...now);
    });
    newest = args;
  };
}

// Call an async `work` at most once for each picture of the screen, and never twice at a time: if it is asked for again
// meanwhile, it is done once more at the end. So each answer is shown, however long it takes.
function oneAtATime(work) {
  let busy = false, again = false;
  return async () => {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        await new Promise(requestAnimationFrame);
        again = false;
        await work();
      }
    } finally {
      busy = false;
    }
  };
}

const round = (number, digits = 2) => number.toFixed(digits);
const likesMotion = () => !matchMedia("(prefers-reduced-motion: reduce)").matches;

// The page's side of the worker: ask(slot, task, request, receive) -> a promise of true when it is done, and of false
// when a newer request with the same slot has overtaken it. receive gets each part of the answer.
class Engine {
  constructor(program) {
    this.worker = new Worker(URL.createObjectURL(new Blob([program], {type: "text/javascript"})));
    this.pending = new Map();
    this.slots = new Map();
    this.count = 0;
    this.worker.onerror = (event) => complain(event.message || "the worker did not start", "worker");
    this.worker.onmessage = ({data: {id, part, error, done}}) => {
      const request = this.pending.get(id);
      if (!request) return;
      if (part) return request.receive(part);
      this.pending.delete(id);
      if (error) request.reject(new Error(error)); else request.resolve(done);
    };
  }

  ask(slot, task, request, receive = () => {}) {
    const id = ++this.count, older = this.pending.get(this.slots.get(slot));
    if (older) older.resolve(false);
    this.pending.delete(this.slots.get(slot));
    this.slots.set(slot, id);
    this.worker.postMessage({...request, id, slot, task});
    return new Promise((resolve, reject) => this.pending.set(id, {receive, resolve, reject}));
  }

  // Overtake all requests.
  overtakeAll() { for (const slot of this.slots.keys()) this.ask(slot, "nothing", {}); }
}
