// The page: its state, which stands in the address, the tabs, and the choice of the model.

const app = {entries: [], entry: null, code: null, process: null, engine: null, state: {}, views: {
  make: makeView, sketch: sketchView, compare: compareView, inside: insideView}};

// The keys of the address and how each is read: a function of the text and the entry of the model -> value, or
// undefined for what cannot be.
const within = (low, high, whole = true) => (text) => {
  const number = Number(text);
  return text !== "" && number >= low && number <= high && (!whole || Number.isInteger(number)) ? number : undefined;
};
const KEYS = {
  view: (text) => Object.hasOwn(app.views, text) ? text : undefined,
  model: (text) => within(0, app.entries.length - 1)(text),
  label: (text, {class_names: names}) => text === "any" ? null : within(0, names.length - 1)(text),
  sampler: (text, {samplers}) => Object.hasOwn(samplers, text) ? text : undefined,
  steps: (text, {alphas_cumprod: {length}}) => within(1, Math.min(50, length))(text),
  guidance: within(0, 8, false),
  seed: within(0, 999999999),
  step: within(0, 50),
  block: (text, entry) => blocksOf(entry).some(({name}) => name === text) ? text : undefined,
  a: within(0, 999999999),
  b: within(0, 999999999),
  share: within(0, 100),
  t: (text, {alphas_cumprod: {length}}) => within(0, length - 1)(text),
  told: (text, {class_names: names}) => within(0, names.length - 1)(text),
  keep: (text) => Object.hasOwn(HALVES, text) ? text : undefined,
  drawing: (text, {shape}) => unpackDrawing(text, shape.reduce((a, b) => a * b)) && text,
};

const defaultsOf = ({class_names: names, defaults, alphas_cumprod: {length}}) => ({
  view: "make", model: 0, label: names.length ? Math.min(7, names.length - 1) : null, sampler: defaults.sampler,
  steps: defaults.steps, guidance: defaults.guidance_scale, seed: 0, step: null, block: "middle", a: 0, b: 1, share: 50,
  t: Math.round((length - 1) / 2), told: null, keep: "left", drawing: null,
});

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
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
function writeAddress() {
  waitingToWrite ??= setTimeout(() => {
    waitingToWrite = null;
    const words = Object.entries(app.state).filter(([key, value]) => value !== null || key === "label");
    history.replaceState(null, "", "#" + new URLSearchParams(words.map(([key, value]) => [key, value ?? "any"])));
  }, 400);
}

app.open = (name) => {
  if (name !== app.state.view) app.views[app.state.view].close?.();
  app.setState({view: name});
  for (const each of Object.keys(app.views)) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", each === name);
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  app.views[name].open();
};

// Take the state of the address: load its model if that is another one, and make its image.
async function takeAddress() {
  const state = readAddress(), entry = app.entries[state.model];
  if (app.entry !== entry) {
    Object.assign(app, {entry, code: new LevelCode(entry.levels),
                        process: new DiffusionProcess(entry.diffusion, entry.alphas_cumprod)});
    Object.assign(film, {frames: [], at: 0, done: false});
    app.state = state;
    for (const view of Object.values(app.views)) view.build?.(entry);
    document.documentElement.style.setProperty("--aspect", entry.shape[2] / entry.shape[1]);
    $("parameters").textContent = entry.parameters.toLocaleString("en");
    $("dataset").textContent = entry.dataset;
    await app.engine.ask("load", "load", {model: state.model, entry, weights: $(`weights-${state.model}`).textContent,
                                          wasm: $("multiply").textContent});
  }
  app.setState(state);
  if (app.models) app.models.set(state.model);
  await makeImage({step: state.step});
  app.open(state.view);
}

// Say what went wrong: of this page, or of its worker.
function complain(problem) {
  $("told").textContent = `This did not work: ${problem}. A newer browser may help.`;
}

function startPage() {
  addEventListener("error", (event) => complain(event.message));
  addEventListener("unhandledrejection", (event) => complain(event.reason));
  app.entries = JSON.parse($("entries").textContent);
  app.engine = new Engine($("program").textContent);
  for (const view of Object.values(app.views)) view.start();
  $("models").hidden = app.entries.length < 2;
  app.models = choices($("models"), app.entries.map(({dataset}, i) => [i, dataset]), (model) => {
    location.hash = new URLSearchParams({view: app.state.view, model});
  });
  const tabs = Object.keys(app.views);
  for (const [i, name] of tabs.entries()) {
    $(`tab-${name}`).addEventListener("click", () => app.open(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const next = {ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: tabs.length - 1}[event.key];
      if (next === undefined) return;
      const tab = $(`tab-${tabs.at(next % tabs.length)}`);
      tab.focus();
      tab.click();
    });
  }
  addEventListener("hashchange", takeAddress);
  takeAddress();
}

if (typeof document === "undefined") startWorker(); else startPage();
