// The view "Make": one image, with all steps of its way from noise.

const FILM_SECONDS = 0.9, STRIP_FRAMES = 16;
const PATIENCE = 300;  // milliseconds: an image that takes longer gives way to a newer one

// frames: {t, x, x0} of each step, x0 what the network sees in x; at: the one that is shown; timer: of the playback;
// job: what was asked for; begun: when; again: whether the state has changed since; patience: the timer that
// then ends the wait for it.
const film = {frames: [], at: 0, timer: null, done: false, job: null, begun: 0, again: false, patience: null};

function jobOf({label, sampler, steps, guidance, seed}) {
  return {label, sampler, steps, guidance: label === null ? 1 : guidance, seed};
}

const nameOf = (label) => label === null ? "image without a label" : app.entry.class_names[label];

// Make the image of the state. motion: show its steps one after the other; step: show this one at the end.
async function makeImage({motion = false, step = null} = {}) {
  const begun = performance.now(), frames = [], job = jobOf(app.state);
  stopFilm();
  clearTimeout(film.patience);
  Object.assign(film, {frames, job, begun, done: false, again: false});
  if (motion && likesMotion()) playFilm();
  const done = await app.engine.ask("make", "make", {model: app.state.model, job}, ({t, x, x0}) => {
    if (x0) frames.at(-1).x0 = x0;
    frames.push({t, x, x0: t < 0 ? x : null});
  }).catch((error) => {
    if (film.frames === frames) stopFilm();
    throw error;
  });
  if (!done) return;
  film.done = true;
  showStrip();
  showCommand();
  if (film.timer === null) showFrame(step === null ? frames.length - 1 : Math.min(step, frames.length - 1));
  const seconds = (performance.now() - begun) / 1000, {label, steps} = job;
  $("told").textContent = `Made ${label === null ? "an" : "the"} ${nameOf(label)} in ${steps} ` +
    `${steps === 1 ? "step" : "steps"} and ${round(seconds)} seconds.`;
  app.views[app.state.view].filmChanged?.();
  if (film.again) makeImage();
}

function playFilm() {
  const pause = Math.max(16, FILM_SECONDS * 1000 / (film.job.steps + 1));
  let next = 0;
  (function tick() {
    film.timer = setTimeout(tick, pause);
    if (film.frames[next]?.x0) showFrame(next++);
    if (film.done && next >= film.frames.length) stopFilm();
  })();
  $("play").textContent = "❚❚";
  $("play").setAttribute("aria-label", "Stop");
}

function stopFilm() {
  clearTimeout(film.timer);
  film.timer = null;
  $("play").textContent = "▶";
  $("play").setAttribute("aria-label", "Play the steps");
}

// Show a step in this view, and in "Inside".
function showFrame(index) {
  const {t, x, x0} = film.frames[index], last = film.frames.length - 1, {shape} = app.entry;
  film.at = index;
  paint($("make-x"), app.code.decode(x), shape, `The image at step ${index}`);
  paint($("make-x0"), app.code.decode(x0), shape, `What the network sees in it: ${nameOf(film.job.label)}`);
  for (const id of ["step", "inside-step"]) {
    $(id).max = film.job.steps;
    $(id).value = index;
    $(id).setAttribute("aria-valuetext", t < 0 ? "the image" : `step ${index}, t = ${t.toFixed(0)}`);
  }
  markNow($("strip"), index);
  showMixture($("mixture"), t);
  app.setState({step: film.timer !== null || index === last && film.done ? null : index});
  app.views.inside.frameChanged();
}

// "t = 712: x_t = 0.31 · image + 0.95 · noise", in colours.
function showMixture(paragraph, t) {
  if (t < 0) return paragraph.replaceChildren("The image: no noise is left.");
  const part = (className, text) => element("span", {className}, text), {process} = app;
  paragraph.replaceChildren(
    `t = ${t.toFixed(0)}: `, element("i", {}, "x", element("sub", {}, "t")), " = ",
    part("signal", `${round(process.alpha(t))} · image`), " + ", part("noise", `${round(process.sigma(t))} · noise`));
}

function showStrip() {
  const last = film.frames.length - 1, count = Math.min(STRIP_FRAMES, last + 1);
  const indices = Array.from({length: count}, (_, i) => count > 1 ? Math.round(i * last / (count - 1)) : last);
  const canvases = fillStrip($("strip"), indices, scrubTo);
  for (const [i, index] of indices.entries())
    paint(canvases[i], app.code.decode(film.frames[index].x), app.entry.shape);
  markNow($("strip"), film.at);
}

function scrubTo(index) {
  stopFilm();
  if (film.frames[index]?.x0) showFrame(index);
}

// The command that makes the same image. Without a label: a guidance of 0 leaves nothing of the first label.
function showCommand() {
  const {label, sampler, steps, guidance, seed} = film.job, {name, label_words: words, use_ema: average} = app.entry;
  const asked = !words.length ? [] : label === null ? [`--label ${words[0]}`, "--guidance_scale 0"]
    : [`--label ${words[label]}`, `--guidance_scale ${guidance}`];
  const parts = ["python sample.py", `--checkpoint ${name}`, ...average ? [] : ["--no-use_ema"], "--num_images 1",
                 ...asked, `--sampler ${sampler}`, `--steps ${steps}`, `--seed ${seed}`, "--precision fp32"];
  $("command").replaceChildren(...parts.flatMap((word) => [" ", element("span", {}, word)]).slice(1));
}

const makeView = {
  // Once: the controls that are the same for every model.
  start() {
    $("another").addEventListener("click", () => {
      app.setState({seed: randomSeed()});
      makeImage({motion: true});
    });
    numberField($("seed"), (seed) => changeAndMake({seed}));
    $("sampler").addEventListener("change", () => changeAndMake({sampler: $("sampler").value}));
    $("step").addEventListener("input", () => scrubTo(Number($("step").value)));
    $("play").addEventListener("click", () => film.timer === null ? film.done && playFilm() : scrubTo(film.at));
    $("copy").addEventListener("click", async () => {
      let copied = true;
      try {
        await navigator.clipboard.writeText($("command").textContent);
      } catch {  // not allowed here: select it, and let the browser copy what is selected
        getSelection().selectAllChildren($("command"));
        copied = document.execCommand("copy");
      }
      $("copy").textContent = copied ? "Copied" : "Selected: copy it by the keyboard";
      setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
    });
  },

  // For every model: what it can be asked for.
  build({class_names: names, samplers, guided}) {
    this.label = labelChoices($("labels"), names, guided ? "any" : null, (label) => changeAndMake({label}));
    $("sampler").replaceChildren(...Object.keys(samplers).map((value) => element("option", {value}, value)));
    $("sliders").replaceChildren();
    this.steps = slider($("sliders"), {name: "Steps", min: 1, max: Math.min(50, app.process.numTimesteps), value: 10},
                        (steps) => changeAndMake({steps}));
    this.guidance = slider($("sliders"), {name: "Guidance by the label", min: 0, max: 8, step: 0.25, value: 1},
                           (guidance) => changeAndMake({guidance}));
    this.guidance.input.closest("label").hidden = !guided;
  },

  // Put the state into the controls.
  show({label, sampler, steps, guidance, seed}) {
    this.label.set(label);
    this.steps.set(steps);
    this.guidance.set(guidance);
    this.guidance.input.disabled = label === null;
    $("sampler").value = sampler;
    setNumber($("seed"), seed);
  },

  open() { if (film.frames.length && film.done) showFrame(film.at); },
};

// While a slider moves, image after image is finished, each of the newest state then, if it takes no longer than
// PATIENCE.
function changeAndMake(changes) {
  app.setState(changes);
  if (film.done) return makeImage();
  film.again = true;
  clearTimeout(film.patience);
  film.patience = setTimeout(makeImage, Math.max(0, film.begun + PATIENCE - performance.now()));
}
