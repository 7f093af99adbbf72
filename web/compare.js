// The view "Compare": one noise with all classes, guidance × steps, and the images between two noises.

const STEPS_COLUMNS = [1, 2, 4, 8, 16], GUIDANCE_ROWS = [0, 1, 1.5, 3, 6], BETWEEN_FRAMES = 13;
const MOST_CLASSES = 40;  // more would keep the rest of the view waiting

// What is shown complete in each place: the jobs, as a text. Another model begins with nothing.
const finished = {};

// Show the images of jobs in a place, if it does not hold them: arrange() makes room, and receive(index, x) gets each
// image. A promise of true when they are complete.
async function makeMany(place, jobs, arrange, receive) {
  const key = JSON.stringify(jobs);
  if (finished[place] === key) return true;
  finished[place] = null;
  arrange();
  const done = await app.engine.ask(place, "many", {model: app.state.model, jobs}, ({index, x}) => receive(index, x));
  if (done) finished[place] = key;
  return done;
}

// receive for canvases in the order of the jobs.
const painter = (jobs, canvases) => (index, x) =>
  paint(canvases[index], app.code.decode(x), app.entry.shape, `${nameOf(jobs[index].label)}, seed ${jobs[index].seed}`);

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
  const names = app.entry.class_names, job = jobOf(app.state), first = Math.min(
    app.state.label ?? 0, Math.max(0, names.length - MOST_CLASSES));
  const labels = Array.from({length: Math.min(MOST_CLASSES, names.length)}, (_, i) => first + i);
  const jobs = names.length ? labels.map((label) => ({...job, label, guidance: app.state.guidance}))
    : Array.from({length: 10}, (_, i) => ({...job, seed: (job.seed + i) % 1e9}));
  const canvases = jobs.map(opening);
  $("classes-title").textContent = !names.length ? "Ten noises" : labels.length === names.length
    ? "One noise, all classes" : `One noise, ${labels.length} of ${names.length} classes`;
  return makeMany("classes", jobs, () => $("classes").replaceChildren(...canvases.map((canvas, i) =>
    element("figure", {}, canvas, element("figcaption", {}, names.length ? names[jobs[i].label] : `seed ${jobs[i].seed}`)))),
                  painter(jobs, canvases));
}

function showTable() {
  const {guided, samplers} = app.entry, T = app.process.numTimesteps, {label} = app.state, job = jobOf(app.state);
  const columns = STEPS_COLUMNS.filter((steps) => steps <= T);
  const rows = guided
    ? GUIDANCE_ROWS.map((guidance) => [String(guidance), {label: label ?? 0, guidance}])
    : Object.keys(samplers).map((sampler) => [sampler, {sampler}]);
  const jobs = rows.flatMap(([, changes]) => columns.map((steps) => ({...job, ...changes, steps})));
  const canvases = jobs.map(opening);
  const caption = element("caption", {}, `${guided ? `The ${nameOf(jobs[0].label)}. Guidance` : "Sampler"} ↓  ` +
    "Steps →");
  const head = columns.map((steps) => element("th", {scope: "col"}, String(steps)));
  const body = rows.map(([name], row) =>
    element("tr", {}, element("th", {scope: "row"}, name), ...columns.map((_, column) =>
      element("td", {}, canvases[row * columns.length + column]))));
  return makeMany("table", jobs, () => $("table").replaceChildren(
    caption, element("thead", {}, element("tr", {}, element("td"), ...head)), element("tbody", {}, ...body)),
                  painter(jobs, canvases));
}

// The images at even shares of the way, first the ends; the slider shows the nearest at once, then its own, of `share`.
const between = {images: [], share: null};

async function showBetween() {
  const {a, b} = app.state, job = {...jobOf(app.state), seed: a, towards: b}, last = BETWEEN_FRAMES - 1;
  const order = [0, last, ...Array.from({length: last - 1}, (_, i) => i + 1)];
  const jobs = order.map((i) => ({...job, share: i / last}));
  const done = await makeMany("between", jobs, () => {
    Object.assign(between, {images: [], share: null});
    fillStrip($("between-strip"), [...order].sort((x, y) => x - y), (i) => {
      app.setState({share: Math.round(100 * i / last)});
      showShare();
    });
  }, (index, x) => {
    const i = order[index], levels = app.code.decode(x);
    between.images[i] = x;
    paint($("between-strip").children[i], levels, app.entry.shape);
    if (i === 0) paint($("end-a"), levels, app.entry.shape, `The image of seed ${a}`);
    if (i === last) paint($("end-b"), levels, app.entry.shape, `The image of seed ${b}`);
    if (i === nearest()) showShare();
  });
  if (done && between.share !== app.state.share) showShare();
}

const nearest = () => Math.round(app.state.share / 100 * (BETWEEN_FRAMES - 1));

function showShare() {
  const {a, b, share} = app.state, {shape} = app.entry, canvas = $("between"), text = `${share} % of the second noise`;
  $("share").value = share;
  $("share").setAttribute("aria-valuetext", text);
  $("share-text").textContent = text;
  between.share = share;
  markNow($("between-strip"), nearest());
  if (between.images[nearest()]) paint(canvas, app.code.decode(between.images[nearest()]), shape, text);
  const job = {...jobOf(app.state), seed: a, towards: b, share: share / 100};
  app.engine.ask("share", "many", {model: app.state.model, jobs: [job]}, ({x}) =>
    paint(canvas, app.code.decode(x), shape, text));
}

const compareView = {
  start() {
    $("new-noise").addEventListener("click", () => {
      app.setState({seed: randomSeed()});
      makeImage();
      this.open();  // the rest of what was being made is overtaken
    });
    const redraw = onFrame(showShare);
    $("share").addEventListener("input", () => {
      app.setState({share: Number($("share").value)});
      redraw();
    });
    for (const end of ["a", "b"])
      numberField($(`seed-${end}`), (seed) => {
        app.setState({[end]: seed});
        showBetween();
      });
  },

  build({class_names: names, guided}) {
    for (const id of ["classes", "table", "between-strip"]) $(id).replaceChildren();
    for (const id of ["end-a", "between", "end-b"]) $(id).width = $(id).width;  // this clears a canvas
    for (const place of Object.keys(finished)) finished[place] = null;
    Object.assign(between, {images: [], share: null});
    $("classes-text").textContent = names.length ? "The same noise, with another label each time. What the images " +
      "have in common, such as slant or thickness, comes from the noise."
      : "This network was trained without labels: the noise alone decides.";
    $("table-title").textContent = guided ? "Guidance and steps" : "Samplers and steps";
    $("table-text").textContent = guided ? "Guidance pushes the image towards the label, from 0 (the label is " +
      "ignored) over 1 (what was learnt) to what is too much; more steps follow the path more closely."
      : "With many steps most samplers come to the same image; with few they differ.";
  },

  show({a, b, share}) {
    setNumber($("seed-a"), a);
    setNumber($("seed-b"), b);
    $("share").value = share;
  },

  // Make what is not shown yet, from top to bottom.
  async open() { if (await showClasses() && await showTable()) showBetween(); },

  close() { for (const slot of ["classes", "table", "between"]) app.engine.ask(slot, "nothing", {}); },
};
