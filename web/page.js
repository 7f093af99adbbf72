// The page: its state, which stands in the address, the tabs, and the choice of the model.

const app = {entries: [], entry: null, code: null, process: null, engine: null, state: {}, shown: null, views: {
  make: makeView, sketch: sketchView, compare: compareView, inside: insideView}};

// The keys of the address and how each is read: a function of the text and the entry of the model -> value, or
// undefined for what cannot be.
const within = (low, high, whole = true) => (text) => {
  const number = Number(text);
  return text !== "" && number >= low && number <= high && (!whole || Number.isInteger(number)) ? number : undefined;
};
const knowsAny = ({class_names: names, guided}) => guided || !names.length;  // images without a label
const KEYS = {
  view: (text) => Object.hasOwn(app.views, text) ? text : undefined,
  model: (text) => within(0, app.entries.length - 1)(text),
  label: (text, entry) => text !== "any" ? within(0, entry.class_names.length - 1)(text)
    : knowsAny(entry) ? null : undefined,
  sampler: (text, {samplers}) => Object.hasOwn(samplers, text) ? text : undefined,
  steps: (text, {alphas_cumprod: {length}}) => within(1, Math.min(50, length))(text),
  guidance: (text, {guided}) => guided ? within(0, 8, false)(text) : undefined,
  seed: within(0, 999999999),
  step: within(0, 50),
  block: (text, entry) => blocksOf(entry).some(({name}) => name === text) ? text : undefined,
  a: within(0, 999999999),
  b: within(0, 999999999),
  share: within(0, 100),
  t: (text, {alphas_cumprod: {length}}) => within(0, length - 1)(text),
  told: (text, {class_names: names}) => within(0, names.length - 1)(text),
  keep: (text) => Object.hasOwn(HALVES, text) ? text : undefined,
  drawing: (text, {shape, levels}) =>
    unpackDrawing(text, shape.reduce((a, b) => a * b), new LevelCode(levels).paper()),
};

const defaultsOf = (entry, {class_names: names, defaults, alphas_cumprod: {length}} = entry) => ({
  view: "make", model: 0, label: names.length ? Math.min(7, names.length - 1) : null, sampler: defaults.sampler,
  steps: defaults.steps, guidance: defaults.guidance_scale, seed: 0, step: null, block: "middle", a: 0, b: 1, share: 50,
  t: Math.round((length - 1) / 2), told: knowsAny(entry) ? null : 0, keep: "left", drawing: null,
});

let address = null;  // as this page read or wrote it last

function readAddress() {
  address = location.hash;
  const given = new URLSearchParams(address.slice(1));
  const model = KEYS.model(given.get("model") ?? "0") ?? 0, entry = app.entries[model], state = defaultsOf(entry);
  for (const [key, read] of Object.entries(KEYS)) {
    const value = given.has(key) ? read(given.get(key), entry) : undefined;
    if (value !== undefined) state[key] = value;
  }
  return {...state, model};
}

app.setState = (changes) => {
  Object.assign(app.state, changes);
  for (const view of Object.values(app.views)) view.show?.(app.state);
  writeAddress();
};

// Browsers allow few changes of the address in a minute.
let waitingToWrite = null;
function writeAddress() { waitingToWrite ??= setTimeout(writeNow, 400); }

function writeNow() {
  clearTimeout(waitingToWrite);
  waitingToWrite = null;
  if (location.hash !== address) return;  // somebody has just given another one, which is about to be taken
  const words = Object.entries(app.state).filter(([key, value]) => value !== null || key === "label");
  history.replaceState(null, "", "#" + new URLSearchParams(words.map(([key, value]) =>
    [key, key === "drawing" ? packDrawing(value, sketch.paper) : value ?? "any"])));
  address = location.hash;
}

// Show a view; `shown` is its name from then on.
app.open = (name) => {
  if (name !== app.shown) app.views[app.shown]?.close?.();
  app.shown = name;
  app.setState({view: name});
  $("problem").hidden = !$("problem").lasting;
  for (const each of Object.keys(app.views)) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", each === name);
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  app.views[name].open();
};

// Take the state of the address: load its model if that is another one, show its view, and make its image.
function takeAddress() {
  const state = readAddress(), entry = app.entries[state.model];
  app.state = state;
  stopFilm();  // no view shall take the image of the old state for that of the new one
  Object.assign(film, {frames: [], at: 0, done: false});
  if (app.entry !== entry) loadModel(entry, state.model);
  app.models.set(state.model);
  app.open(state.view);
  makeImage({step: state.step});
}

// What the old model was asked for is dropped. The worker takes requests in turn: none has to wait here for the load.
function loadModel(entry, model) {
  if ($("problem").lasting === "model") $("problem").lasting = false;  // that of another one
  app.engine.overtakeAll();
  Object.assign(app, {entry, code: new LevelCode(entry.levels),
                      process: new DiffusionProcess(entry.diffusion, entry.alphas_cumprod)});
  for (const view of Object.values(app.views)) view.build?.(entry);
  document.documentElement.style.setProperty("--aspect", entry.shape[2] / entry.shape[1]);
  $("parameters").textContent = entry.parameters.toLocaleString("en");
  $("dataset").textContent = entry.dataset;
  const request = {model, entry, weights: $(`weights-${model}`).textContent, wasm: $("multiply").textContent};
  app.engine.ask("load", "load", request).catch((error) => complain(error, "model"));
}

// Say what went wrong in this page or in its worker, above whichever view is shown. lasting: "worker" if nothing works
// from now on, "model" if this model does not.
function complain(problem, lasting = false) {
  if (!$("problem").hidden && !(lasting && !$("problem").lasting)) return;  // what fails first says most
  $("problem").lasting = lasting;
  $("problem").textContent = `This did not work: ${problem}. A newer browser may help.`;
  $("problem").hidden = false;
}

// What a model is called: its data, or its file where several have the same data.
const chipOf = ({dataset, name}) => app.entries.filter((each) => each.dataset === dataset).length > 1 ? name : dataset;

function startPage() {
  addEventListener("error", (event) => complain(event.message));
  addEventListener("unhandledrejection", (event) => complain(event.reason));
  app.entries = JSON.parse($("entries").textContent);
  app.engine = new Engine($("program").textContent);
  for (const view of Object.values(app.views)) view.start();
  $("models").hidden = app.entries.length < 2;
  app.models = choices($("models"), app.entries.map((entry, i) => [i, chipOf(entry)]), (model) => {
    writeNow();  // for the way back
    location.hash = new URLSearchParams({view: app.state.view, model});
  });
  for (const name of Object.keys(app.views)) $(`tab-${name}`).addEventListener("click", () => app.open(name));
  arrowKeys(document.querySelector("[role=tablist]"));
  addEventListener("hashchange", takeAddress);
  takeAddress();
}

if (typeof document === "undefined") startWorker(); else startPage();
