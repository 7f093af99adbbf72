// What the page holds of a checkpoint: weights in base64, and the code of the levels of a pixel.

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// IEEE 754 half precision -> number: sign, 5 bits of exponent, 10 of fraction.
function halfToNumber(bits) {
  const exponent = bits >> 10 & 31, fraction = bits & 1023;
  return (bits & 32768 ? -1 : 1) * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}

// name -> {shape, data} of the tensors [name, shape] that lie in the bytes one after the other.
function unpackWeights(tensors, bytes, precision) {
  let numbers;
  if (precision === "float16") {
    const table = Float32Array.from({length: 65536}, (_, bits) => halfToNumber(bits));
    numbers = Float32Array.from(new Uint16Array(bytes.buffer), (bits) => table[bits]);
  } else {
    numbers = new Float32Array(bytes.buffer);
  }
  let end = 0;
  return new Map(tensors.map(([name, shape]) => {
    const size = shape.reduce((a, b) => a * b, 1);
    return [name, {shape, data: numbers.subarray(end, end += size)}];
  }));
}

const PAPER_GAP = 0.1;  // of the range of 2, of which a level has 0.008 in a linear code

// LevelCode of data.py: the number in [-1, 1] that the network sees for each of the 256 levels of a pixel.
class LevelCode {
  constructor(points) {
    this.points = points;
    this.edges = points.slice(1).map((point, i) => Math.fround((point + points[i]) / 2));
  }

  encode(levels) { return Float32Array.from(levels, (level) => this.points[level]); }

  decode(x) { return Uint8Array.from(x, (value) => this.level(value)); }

  // The level of the paper, which most pixels have: it has wide gaps beside it. 0 where no level is that common. Of
  // colours it is one level for all channels, so that coloured paper is shown grey.
  paper() {
    const gap = (k) => this.points[k + 1] - this.points[k];
    const widths = Array.from(this.points, (_, k) => k % 255 ? 2 * Math.min(gap(k - 1), gap(k)) : gap(k ? 254 : 0));
    const widest = widths.indexOf(Math.max(...widths));
    return widths[widest] > PAPER_GAP ? widest : 0;
  }

  // The level of the nearest point: the number of edges below the value, by bisection.
  level(value) {
    let low = 0, high = this.edges.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.edges[middle] < value) low = middle + 1; else high = middle;
    }
    return low;
  }
}
