// Classifies a photo by a file of keras_tnt.export.onnx, as keras_tnt.load_image and the model do in
// Python: the same crop, resized by the same arithmetic.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more want headers that a plain file server does not send

const MAX_PIXELS = 2 ** 26;

// === The file ===

/** The strings in an ONNX file's metadata: field 14 of its protocol buffer, pairs of key and value. */
export function metadataOf(bytes) {
  const metadata = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const pair = new Map(fields(entry));
    const [key, value] = [1, 2].map((n) => new TextDecoder().decode(pair.get(n)));
    metadata[key] = value;
  }
  return metadata;
}

/** [number, bytes] of each field of a protocol buffer that holds bytes. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let [value, scale] = [0, 1];
    for (;;) {
      if (at >= bytes.length) throw new Error("This is no ONNX file.");
      const byte = bytes[at++];
      value += (byte % 128) * scale;
      scale *= 128;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const size = varint();
      if (at + size > bytes.length) throw new Error("This is no ONNX file, or only a part of one.");
      yield [Math.floor(key / 8), bytes.subarray(at, at + size)];
      at += size;
    } else throw new Error("This is no ONNX file.");
  }
}

/** A function from the bytes of a picture to its classes: see `classify` in it. */
export async function open(bytes) {
  const told = metadataOf(bytes);
  if (!told.image_size) throw new Error("This file does not describe its images. Use a file that keras_tnt.export.onnx wrote.");
  const card = {
    size: JSON.parse(told.image_size),
    covered: JSON.parse(told.resized_to_cover),
    channels: JSON.parse(told.channels),
    first: told.data_format === "channels_first",
    mean: JSON.parse(told.mean),
    std: JSON.parse(told.std),
    normalised: told.input === "normalised",
    labels: JSON.parse(told.labels),
  };
  if (!card.labels) throw new Error("This model has no classifier.");
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  /** {logits, classes: [[name, probability], ...]}, likeliest first, of an encoded image. */
  return async function classify(picture) {
    const pixels = evaluationCrop(await decoded(picture), card);
    const outputs = await session.run({ images: tensor(pixels, card) });
    const probabilities = Array.from(outputs.probabilities.data);
    const order = probabilities.map((_, i) => i).sort((i, j) => probabilities[j] - probabilities[i]);
    return {
      logits: Array.from(outputs.logits.data),
      classes: order.map((i) => [card.labels[i], probabilities[i]]),
    };
  };
}

// === The picture ===

/** {width, height, data: RGBA} of an encoded image, upright, its colors as they stand in the file. */
async function decoded(picture) {
  const settings = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([picture]), settings);
  } catch {
    throw new Error("This cannot be read as an image.");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`This image is too large: ${width} x ${height} pixels.`);
  // WebGL hands pixels over as they are; a 2D canvas would multiply them by their opacity.
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (gl && Math.max(width, height) <= gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
    gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
    const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
    const data = new Uint8Array(4 * width * height);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
    gl.getExtension("WEBGL_lose_context")?.loseContext();
    return { width, height, data };
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return { width, height, data: context.getImageData(0, 0, width, height).data };
}

/** The middle of an image that is resized, bicubic, until it just covers a size: width first. */
export function evaluationCrop(image, card) {
  const [height, width] = card.size;
  const [coveredHeight, coveredWidth] = card.covered;
  const high = coveredHeight * image.width >= coveredWidth * image.height;
  const rows = high ? coveredHeight : Math.trunc((coveredWidth * image.height) / image.width);
  const columns = high ? Math.trunc((coveredHeight * image.width) / image.height) : coveredWidth;
  const values = channels(image, card.channels);
  const wide = stretch(values, image.height, image.width, card.channels, columns, middle(columns, width), width);
  const turned = transpose(wide, image.height, width, card.channels);
  const crop = stretch(turned, width, image.height, card.channels, rows, middle(rows, height), height);
  return transpose(crop, width, height, card.channels); // (height, width, channels)
}

function channels({ data, width, height }, count) {
  const values = new Uint8ClampedArray(width * height * count);
  for (let i = 0; i < width * height; i++) {
    const [red, green, blue] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (count === 1) values[i] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    else values.set([red, green, blue], 3 * i);
  }
  return values;
}

/** Halves are rounded to even. */
function middle(whole, part) {
  const half = (whole - part) / 2;
  return half % 1 === 0.5 ? 2 * Math.round(half / 2) : Math.round(half);
}

/** Columns `first` to `first + count` of rows resized to so many columns, as Pillow resizes. */
function stretch(values, height, width, depth, columns, first, count) {
  const scale = width / columns;
  const widened = Math.max(scale, 1);
  const out = new Uint8ClampedArray(height * count * depth);
  for (let column = 0; column < count; column++) {
    const center = (first + column + 0.5) * scale;
    const start = Math.max(Math.trunc(center - 2 * widened + 0.5), 0);
    const end = Math.min(Math.trunc(center + 2 * widened + 0.5), width);
    let weights = [];
    for (let x = start; x < end; x++) weights.push(cubic((x - center + 0.5) / widened));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    // In 22 bits behind the point, rounded away from zero.
    weights = weights.map((w) => Math.trunc((w / total) * 2 ** 22 + (w < 0 ? -0.5 : 0.5)));
    for (let row = 0; row < height; row++) {
      for (let channel = 0; channel < depth; channel++) {
        let sum = 2 ** 21;
        let place = (row * width + start) * depth + channel;
        for (const weight of weights) {
          sum += values[place] * weight;
          place += depth;
        }
        out[(row * count + column) * depth + channel] = Math.floor(sum / 2 ** 22);
      }
    }
  }
  return out;
}

/** Keys' kernel with a = -0.5. */
function cubic(x) {
  const far = Math.abs(x);
  if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
  return far < 2 ? (((far - 5) * far + 8) * far - 4) * -0.5 : 0;
}

function transpose(values, rows, columns, depth) {
  const out = new Uint8ClampedArray(values.length);
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++)
      for (let channel = 0; channel < depth; channel++)
        out[(column * rows + row) * depth + channel] = values[(row * columns + column) * depth + channel];
  return out;
}

/** The images of a batch of one, as the model takes them. */
function tensor(pixels, card) {
  const [height, width] = card.size;
  const depth = card.channels;
  const values = Float32Array.from(pixels);
  if (card.normalised) {
    const [mean, std] = [card.mean, card.std].map((told) =>
      told.length === depth ? told : [told.reduce((sum, value) => sum + value, 0) / told.length],
    );
    for (let i = 0; i < values.length; i++) values[i] = (values[i] / 255 - mean[i % depth]) / std[i % depth];
  }
  if (!card.first) return new ort.Tensor("float32", values, [1, height, width, depth]);
  const moved = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) moved[(i % depth) * height * width + Math.floor(i / depth)] = values[i];
  return new ort.Tensor("float32", moved, [1, depth, height, width]);
}
