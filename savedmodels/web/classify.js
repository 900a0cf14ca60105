// Classifies a photo with a file of keras_tnt.export.onnx. The crop is the same as that of
// keras_tnt.load_image in Python, resized with the same fixed-point arithmetic.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more threads need headers (COOP, COEP) that a static file server does not send

const MAX_PIXELS = 2 ** 26;

// === The file ===

/** Returns an ONNX file's metadata, field 14 of its protocol buffer, as an object of strings. */
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

/** Yields [number, bytes] of each length-delimited field of a protocol buffer. */
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

/** Opens an ONNX file, and returns a function from the bytes of an image to its classes. */
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
  /** Returns {logits, classes: [[name, probability], ...]}, most likely first, for an encoded image. */
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

/**
 * Decodes an image to {width, height, data: RGBA}, upright, by the specification of keras_tnt.images.decoding.
 * The browser decodes; EXIF orientation and the screen of a GIF are applied here, because browsers
 * differ.
 */
async function decoded(picture) {
  const bytes = new Uint8Array(picture);
  const kind = kindOf(bytes);
  if (kind === "GIF") {
    const frame = firstFrame(bytes);
    return onScreen(await pixelsOf(frame.file), frame);
  }
  const { orientation, file } = withoutOrientation(bytes, kind);
  return upright(await pixelsOf(file), orientation);
}

/** Leading bytes of each format; null matches any byte. */
const SIGNATURES = {
  JPEG: [0xff, 0xd8, 0xff],
  PNG: [0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10],
  GIF: [...text("GIF8")],
  BMP: [...text("BM")],
  WEBP: [...text("RIFF"), null, null, null, null, ...text("WEBP")],
};

function text(characters) {
  return new TextEncoder().encode(characters);
}

function kindOf(bytes) {
  const kind = Object.keys(SIGNATURES).find((name) =>
    SIGNATURES[name].every((byte, i) => byte === null || byte === bytes[i]),
  );
  if (!kind) throw new Error("This cannot be read as an image. JPEG, PNG, WebP, GIF and BMP are read.");
  if (kind === "BMP" && !isPlainBmp(bytes))
    throw new Error("A compressed BMP, or one of 16 bits per pixel, is not read.");
  return kind;
}

/** Returns the unsigned integer in `count` bytes; bytes beyond the end are 0. */
function integer(bytes, start, count, little = true) {
  let value = 0;
  for (let i = 0; i < count; i++) value = value * 256 + (bytes[start + (little ? count - 1 - i : i)] ?? 0);
  return value;
}

function isPlainBmp(bytes) {
  const [bits, compression] = [integer(bytes, 28, 2), integer(bytes, 30, 4)];
  const masks = [54, 58, 62].map((start) => integer(bytes, start, 4));
  const plain = compression === 0 && [1, 4, 8, 24, 32].includes(bits);
  const usual = compression === 3 && bits === 32 && String(masks) === String([0xff0000, 0xff00, 0xff]);
  return integer(bytes, 14, 4) >= 40 && (plain || usual);
}

/** Returns the EXIF orientation, and a copy of the file without a readable EXIF marker. */
function withoutOrientation(bytes, kind) {
  const find = { JPEG: exifOfJpeg, PNG: exifOfPng, WEBP: exifOfWebp }[kind];
  const found = find?.(bytes);
  if (!found) return { orientation: 1, file: bytes };
  const file = bytes.slice();
  file.fill(0x78, found.name, found.name + 4); // "xxxx", which no decoder knows
  return { orientation: orientationOf(bytes, found.tiff), file };
}

function exifOfJpeg(bytes) {
  let start = 2;
  while (bytes[start] === 0xff && bytes[start + 1] !== 0xda) {
    if (bytes[start + 1] === 0xe1 && integer(bytes, start + 4, 4, false) === 0x45786966)
      return { name: start + 4, tiff: start + 10 };
    start += 2 + integer(bytes, start + 2, 2, false);
  }
}

function exifOfPng(bytes) {
  for (let start = 8; start + 8 <= bytes.length; start += 12 + integer(bytes, start, 4, false))
    if (integer(bytes, start + 4, 4, false) === 0x65584966) return { name: start + 4, tiff: start + 8 };
}

function exifOfWebp(bytes) {
  const step = (start) => 8 + 2 * Math.ceil(integer(bytes, start + 4, 4) / 2);
  for (let start = 12; start + 8 <= bytes.length; start += step(start))
    if (integer(bytes, start, 4, false) === 0x45584946) {
      const marked = integer(bytes, start + 8, 4, false) === 0x45786966;
      return { name: start, tiff: start + 8 + (marked ? 6 : 0) };
    }
}

/** Returns the orientation, 1 to 8, in EXIF data that starts at `tiff`; 1 without. */
function orientationOf(bytes, tiff) {
  const order = integer(bytes, tiff, 4, false);
  if (![0x49492a00, 0x4d4d002a].includes(order)) return 1;
  const little = order === 0x49492a00;
  const directory = tiff + integer(bytes, tiff + 4, 4, little);
  const count = integer(bytes, directory, 2, little);
  for (let i = 0; i < count && directory + 12 * i < bytes.length; i++) {
    const entry = directory + 2 + 12 * i;
    const isShort = integer(bytes, entry + 2, 2, little) === 3 && integer(bytes, entry + 4, 4, little) === 1;
    if (integer(bytes, entry, 2, little) !== 0x0112 || !isShort) continue;
    const value = integer(bytes, entry + 8, 2, little);
    return value >= 1 && value <= 8 ? value : 1;
  }
  return 1;
}

/** Applies an EXIF orientation. */
function upright(image, orientation) {
  if (orientation === 1) return image;
  const transposed = orientation >= 5;
  const [width, height] = transposed ? [image.height, image.width] : [image.width, image.height];
  const from = new Uint32Array(image.data.buffer, image.data.byteOffset, width * height);
  const to = new Uint32Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const column = [2, 3, 6, 7].includes(orientation) ? width - 1 - x : x;
      const row = [3, 4, 7, 8].includes(orientation) ? height - 1 - y : y;
      to[y * width + x] = from[transposed ? column * image.width + row : row * image.width + column];
    }
  }
  return { width, height, data: new Uint8Array(to.buffer) };
}

/** Returns the first frame of a GIF as a separate file without transparency, and its place on the screen. */
function firstFrame(bytes) {
  const colors = (flags) => (flags >= 128 ? 3 * 2 ** ((flags % 8) + 1) : 0);
  const behindBlocks = (start) => {
    while (bytes[start] > 0) start += 1 + bytes[start];
    return start + 1;
  };
  let frame = 13 + colors(bytes[10]);
  let transparent = 0;
  while (bytes[frame] === 0x21) {
    if (bytes[frame + 1] === 0xf9 && bytes[frame + 3] % 2) transparent = bytes[frame + 6];
    frame = behindBlocks(frame + 2);
  }
  if (bytes[frame] !== 0x2c) throw new Error("This cannot be read as an image.");
  const flags = bytes[frame + 9];
  const [left, top, width, height] = [1, 3, 5, 7].map((at) => integer(bytes, frame + at, 2));
  const pixels = frame + 10 + colors(flags);
  const palette = new Uint8Array(768).map((_, i) => (flags >= 128 || bytes[10] >= 128 ? 0 : Math.trunc(i / 3)));
  const table = flags >= 128 ? frame + 10 : 13;
  palette.set(bytes.subarray(table, table + colors(flags >= 128 ? flags : bytes[10])));
  const sides = bytes.subarray(frame + 5, frame + 9);
  const parts = [
    text("GIF89a"), sides, [0xf7, 0, 0], palette, [0x2c, 0, 0, 0, 0], sides, [flags & 64],
    bytes.subarray(pixels, behindBlocks(pixels + 1)), [0x3b],
  ];
  return {
    file: new Uint8Array(parts.flatMap((part) => [...part])),
    left, top,
    width: Math.max(integer(bytes, 6, 2), left + width),
    height: Math.max(integer(bytes, 8, 2), top + height),
    color: palette.subarray(3 * transparent, 3 * transparent + 3),
  };
}

/** Returns a frame at its place on a screen of one color. */
function onScreen(frame, { left, top, width, height, color }) {
  if (width * height > MAX_PIXELS) throw new Error(`This image is too large: ${width} x ${height} pixels.`);
  const data = new Uint8Array(4 * width * height);
  for (let i = 0; i < width * height; i++) data.set(color, 4 * i);
  for (let y = 0; y < frame.height; y++) {
    const row = frame.data.subarray(4 * y * frame.width, 4 * (y + 1) * frame.width);
    data.set(row, 4 * ((top + y) * width + left));
  }
  return { width, height, data };
}

/** Decodes a file to {width, height, data: RGBA}, without color conversion or premultiplied alpha. */
async function pixelsOf(file) {
  const settings = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([file]), settings);
  } catch {
    throw new Error("This cannot be read as an image.");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`This image is too large: ${width} x ${height} pixels.`);
  // WebGL returns the decoded values; a 2D canvas premultiplies alpha, which loses precision.
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

/** Resizes an image (bicubic, width first) to just cover a size, and center-crops it. */
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

/** Returns the offset of a centered part; halves are rounded to even. */
function middle(whole, part) {
  const half = (whole - part) / 2;
  return half % 1 === 0.5 ? 2 * Math.round(half / 2) : Math.round(half);
}

/** Returns columns `first` to `first + count` of rows resized to `columns`, in Pillow's arithmetic. */
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
    // Fixed point with 22 fractional bits; halves are rounded away from zero.
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

/** Evaluates Keys' cubic kernel with a = -0.5. */
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

/** Converts pixels to the model's input, a batch of one. */
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
