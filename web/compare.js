// The view "Compare": one noise with all classes, guidance × steps, and the images between two noises.

const STEPS_COLUMNS = [1, 2, 4, 8, 16], GUIDANCE_ROWS = [0, 1, 1.5, 3, 6], BETWEEN_FRAMES = 13;

// Fill canvases with the images of jobs, as they get ready.
function makeMany(slot, jobs, canvases) {
  return app.engine.ask(slot, "many", {model: app.state.model, jobs}, ({index, x}) => {
    const {label, seed} = jobs[index];
    paint(canvases[index], app.code.decode(x), app.entry.shape, `${nameOf(label)}, seed ${seed}`);
  });
}

// A canvas that opens its image in the view "Make", by the mouse; for the keyboard there are the controls there.
function opening(job) {
  const canvas = element("canvas", {title: "Show how it was made"}), {label, sampler, steps, guidance, seed} = job;
  canvas.addEventListener("click", () => {
    app.setState({label, sampler, steps, seed, ...(label === null ? {} : {guidance})});
    app.open("make");
    makeImage({motion: true});
  });
  return canvas;
}

function showClasses() {
  const names = app.entry.class_names, job = jobOf(app.state);
  const jobs = names.length ? names.map((_, label) => ({...job, label, guidance: app.state.guidance}))
    : Array.from({length: 10}, (_, i) => ({...job, seed: job.seed + i}));
  const canvases = jobs.map(opening);
  $("classes").replaceChildren(...canvases.map((canvas, i) =>
    element("figure", {}, canvas, element("figcaption", {}, names.length ? names[i] : `seed ${jobs[i].seed}`))));
  return makeMany("classes", jobs, canvases);
}

function showTable() {
  const names = app.entry.class_names, T = app.process.numTimesteps, {label} = app.state, job = jobOf(app.state);
  const columns = STEPS_COLUMNS.filter((steps) => steps <= T);
  const rows = names.length
    ? GUIDANCE_ROWS.map((guidance) => [String(guidance), {label: label ?? 0, guidance}])
    : Object.keys(app.entry.samplers).map((sampler) => [sampler, {sampler}]);
  const jobs = rows.flatMap(([, changes]) => columns.map((steps) => ({...job, ...changes, steps})));
  const canvases = jobs.map(opening);
  const caption = element("caption", {}, `${names.length ? "Guidance" : "Sampler"} ↓   Steps →`);
  const head = element("tr", {}, element("td"), ...columns.map((steps) => element("th", {scope: "col"}, String(steps))));
  $("table").replaceChildren(caption, element("thead", {}, head), element("tbody", {}, ...rows.map(([name], row) =>
    element("tr", {}, element("th", {scope: "row"}, name), ...columns.map((_, column) =>
      element("td", {}, canvases[row * columns.length + column]))))));
  return makeMany("table", jobs, canvases);
}

// The images at even shares of the way, first the ends; the slider shows the nearest at once, then its own.
const between = {images: []};

function showBetween() {
  const {a, b} = app.state, job = {...jobOf(app.state), seed: a, towards: b};
  between.images = [];
  const last = BETWEEN_FRAMES - 1, order = [0, last, ...Array.from({length: last - 1}, (_, i) => i + 1)];
  const canvases = Array.from({length: BETWEEN_FRAMES}, (_, i) => {
    const canvas = element("canvas");
    canvas.addEventListener("click", () => {
      app.setState({share: Math.round(100 * i / last)});
      showShare();
    });
    return canvas;
  });
  $("between-strip").replaceChildren(...canvases);
  const jobs = order.map((i) => ({...job, share: i / last}));
  return app.engine.ask("between", "many", {model: app.state.model, jobs}, ({index, x}) => {
    const i = order[index], levels = app.code.decode(x);
    between.images[i] = x;
    paint(canvases[i], levels, app.entry.shape);
    if (i === 0) paint($("end-a"), levels, app.entry.shape, `The image of seed ${a}`);
    if (i === last) paint($("end-b"), levels, app.entry.shape, `The image of seed ${b}`);
    if (i === nearest()) showShare();
  });
}

const nearest = () => Math.round(app.state.share / 100 * (BETWEEN_FRAMES - 1));

function showShare() {
  const {a, b, share} = app.state, {shape} = app.entry, canvas = $("between"), text = `${share} % of the second noise`;
  $("share").value = share;
  $("share").setAttribute("aria-valuetext", text);
  $("share-text").textContent = text;
  [...$("between-strip").children].forEach((each, i) => each.classList.toggle("now", i === nearest()));
  if (between.images[nearest()]) paint(canvas, app.code.decode(between.images[nearest()]), shape, text);
  const job = {...jobOf(app.state), seed: a, towards: b, share: share / 100};
  app.engine.ask("share", "many", {model: app.state.model, jobs: [job]}, ({x}) =>
    paint(canvas, app.code.decode(x), shape, text));
}

const compareView = {
  start() {
    $("new-noise").addEventListener("click", () => {
      app.setState({seed: Math.floor(Math.random() * 1e6)});
      makeImage();
      this.open();  // the rest of what was being made is overtaken
    });
    $("share").addEventListener("input", onFrame(() => {
      app.setState({share: Number($("share").value)});
      showShare();
    }));
    for (const end of ["a", "b"])
      $(`seed-${end}`).addEventListener("input", () => {
        app.setState({[end]: wholeNumber($(`seed-${end}`))});
        showBetween();
      });
  },

  build({class_names: names}) {
    $("classes-title").textContent = names.length ? "One noise, all classes" : "Ten noises";
    $("classes-text").textContent = names.length ? "The same noise, with another label each time. What the images " +
      "have in common, such as slant or thickness, comes from the noise."
      : "This network was trained without labels: the noise alone decides.";
    $("table-title").textContent = names.length ? "Guidance and steps" : "Samplers and steps";
    $("table-text").textContent = names.length ? "Guidance pushes the image towards its label, from 0 (the label is " +
      "ignored) over 1 (what was learnt) to what is too much; more steps follow the path more closely."
      : "With many steps most samplers come to the same image; with few they differ.";
  },

  show({a, b}) {
    if (document.activeElement !== $("seed-a")) $("seed-a").value = a;
    if (document.activeElement !== $("seed-b")) $("seed-b").value = b;
  },

  // Make what is not shown yet, from top to bottom.
  async open() {
    const {model, a, b} = app.state, key = JSON.stringify([model, a, b, jobOf(app.state)]);
    if (key === this.shown) return;
    this.shown = null;
    if (await showClasses() && await showTable() && await showBetween()) this.shown = key;
  },

  close() { for (const slot of ["classes", "table", "between"]) app.engine.ask(slot, "nothing", {}); },
};
