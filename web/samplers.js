// The samplers of samplers.py, and inpaint and slerp of editing.py. A sampler is a generator: it yields
// [t, x_t, x_0_hat] after each step; the last t is -1, the clean image. Equations and sources: in the docstrings there.

const pairs = (times) => times.map((t, i) => [t, times[i + 1] ?? -1]);

function* ddpm(denoise, x, times, process, randn) {
  for (const [t, s] of pairs(times)) {
    const x0 = denoise(x, t);
    x = ddpmStep(x, x0, t, s, process, randn);
    yield [s, x, x0];
  }
}

function* ddim(denoise, x, times, process) {
  for (const [t, s] of pairs(times)) {
    const x0 = denoise(x, t);
    x = ddimStep(x, x0, t, s, process);
    yield [s, x, x0];
  }
}

function* consistency(denoise, x, times, process, randn) {
  for (const [t, s] of pairs(times)) {
    const x0 = denoise(x, t);
    x = s < 0 ? x0 : process.addNoise(x0, s, randn());
    yield [s, x, x0];
  }
}

function* dpmpp_2m(denoise, x, times, process) {
  let previous = null, previousH;
  for (const [t, s] of pairs(times)) {
    const x0 = denoise(x, t), h = (process.logSnr(s) - process.logSnr(t)) / 2;
    const extrapolate = previous && s >= 0 ? h / (2 * previousH) : 0;
    const d = extrapolate ? mix(1 + extrapolate, x0, -extrapolate, previous) : x0;
    x = mix(process.sigma(s) / process.sigma(t), x, -process.alpha(s) * Math.expm1(-h), d);
    [previous, previousH] = [x0, h];
    yield [s, x, x0];
  }
}

function* heun(denoise, x, times, process) {
  for (const [t, s] of pairs(times)) {
    const x0 = denoise(x, t);
    x = ddimStep(x, x0, t, s, process);
    if (s >= 0) {
      const correction = mix(1, denoise(x, s), -1, x0);
      const weight = Math.min(1, (Math.exp((process.logSnr(s) - process.logSnr(t)) / 2) - 1) / 2);
      x = mix(1, x, process.alpha(s) * weight, correction);
    }
    yield [s, x, x0];
  }
}

const ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]];

function* ipndm(denoise, x, times, process) {
  let noises = [];
  for (const [t, s] of pairs(times)) {
    const x0 = denoise(x, t);
    noises = [mix(1 / process.sigma(t), x, -process.alpha(t) / process.sigma(t), x0), ...noises].slice(0, 4);
    x = ddimStep(x, x0, t, s, process);
    if (s >= 0 && noises.length > 1) {
      const weights = ADAMS_BASHFORTH[noises.length - 1];
      const size = process.sigma(s) - process.alpha(s) * process.sigma(t) / process.alpha(t);
      noises.forEach((noise, i) => { x = mix(1, x, size * (weights[i] - (i ? 0 : 1)), noise); });
    }
    yield [s, x, x0];
  }
}

function ddpmStep(x, x0, t, s, process, randn) {
  const [mean, variance] = process.posterior(x, x0, t, s);
  return s < 0 ? mean : mix(1, mean, Math.sqrt(variance), randn());
}

// From x_s back to the noisier x_t.
function forwardStep(x, s, t, process, randn) {
  const ratio = process.alpha(t) / process.alpha(s);
  return mix(ratio, x, Math.sqrt(Math.max(0, process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2)), randn());
}

function ddimStep(x, x0, t, s, process) {
  const keep = process.sigma(s) / process.sigma(t);
  return mix(keep, x, process.alpha(s) - keep * process.alpha(t), x0);
}

const SAMPLERS = {ddpm, ddim, dpmpp_2m, heun, ipndm, consistency};

// Fill in an image where mask is 1 by ddpm steps, each `resample` times with fresh noise in between.
function* inpaint(denoise, x, times, process, randn, known, mask, resample) {
  const denoiseRest = (x, t) => denoise(x, t).map((value, i) => mask[i] ? value : known[i]);
  for (const [t, s] of pairs(times)) {
    for (let again = s < 0 ? 0 : resample - 1; again >= 0; again--) {
      const x0 = denoiseRest(x, t);
      x = ddpmStep(x, x0, t, s, process, randn);
      if (again) x = forwardStep(x, s, t, process, randn); else yield [s, x, x0];
    }
  }
}

// The noise between a (share 0) and b (share 1), on the sphere.
function slerp(a, b, share) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  const angle = Math.acos(Math.min(1, Math.max(-1, dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)))));
  if (angle < 1e-4) return mix(1 - share, a, share, b);
  return mix(Math.sin((1 - share) * angle) / Math.sin(angle), a, Math.sin(share * angle) / Math.sin(angle), b);
}

// ---------------------------------------------------------------------------------------------- the times of the steps

const uniformTimesteps = (T, steps) => Array.from({length: steps}, (_, i) => Math.ceil(T * (steps - i) / steps) - 1);

// T-1, then times at which (sigma/alpha)^(1/rho) falls evenly from high to low.
function karrasTimesteps(process, steps, {low, high, rho}) {
  return Array.from({length: steps}, (_, i) => {
    const share = i / (steps - 1);
    const level = (high ** (1 / rho) * (1 - share) + low ** (1 / rho) * share) ** rho;
    return i ? process.timeOf(-2 * Math.log(level)) : process.numTimesteps - 1;
  });
}

// The times of a sampler. spacing: "uniform" or "karras"; range: {low, high, rho} of the latter.
function spacedTimesteps(process, steps, spacing, range) {
  const times = spacing === "karras" ? karrasTimesteps(process, steps, range)
    : uniformTimesteps(process.numTimesteps, steps);
  const gap = 1 / (2 * steps), last = process.numTimesteps - 1;
  for (let i = steps - 1; i > 0; i--) times[i] = Math.max(times[i], i + 1 < steps ? times[i + 1] + gap : 0);
  if (process.alphasCumprod[last] === 0)
    for (let i = 1; i < steps; i++) times[i] = Math.min(times[i], last - 1 - (i - 1) * gap);
  return times;
}
