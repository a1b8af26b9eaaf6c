"use strict";
// Everything shown follows from `data` and `state`; set() changes the state and shows it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);
const J = data.joints.length;
const SIDES = ["left", "right", "centre"];
const SIDE = data.joints.map((name) => (/^left/i.test(name) ? 0 : /^right/i.test(name) ? 1 : 2));
const LABEL = data.joints.map((name) => name.replaceAll("_", " "));
const state = {
  person: 0, hypothesis: 0, joint: -1, yaw: 0.5, pitch: 0.15, zoom: 1,
  cloud: true, ellipsoids: false, names: false,
};

// --- data: coordinates in mm, x right, y down, z away from the camera

function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

function decode(person) {
  if (person.points) return person;
  const codes = new Uint16Array(bytes(person.poses).buffer);
  person.points = Float32Array.from(codes, (c, i) => person.low[i % 3] + c * person.step[i % 3]);
  person.value = person.logProb && new Float32Array(bytes(person.logProb).buffer);
  person.order = Array.from({ length: data.hypotheses }, (_, m) => m);
  if (person.value) person.order.sort((a, b) => person.value[b] - person.value[a] || a - b);
  person.rank = [];
  person.order.forEach((m, rank) => (person.rank[m] = rank));
  person.variance = Array.from({ length: J }, (_, j) => [0, 4, 8].map((d) => person.covariance[9 * j + d]));
  person.std = person.variance.map((v) => Math.sqrt(v[0] + v[1] + v[2]));
  // the sphere about the middle of the body that holds a standard deviation of every joint
  person.middle = [0, 1, 2].map((d) => {
    const along = Array.from({ length: J }, (_, j) => person.mean[3 * j + d]);
    return (Math.min(...along) + Math.max(...along)) / 2;
  });
  person.radius = Math.max(1, ...person.std.map((std, j) =>
    std + Math.hypot(...person.middle.map((c, d) => person.mean[3 * j + d] - c))));
  return person;
}

const current = () => decode(data.persons[state.person]);

function selected() {
  const person = current(), m = state.hypothesis;
  return m === "mode" ? person.mode : person.points.subarray(3 * J * m, 3 * J * (m + 1));
}

// --- state and address: #person=0&hypothesis=5 or mode, as numbered in the file

function set(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  if (changes.person !== undefined && state.person !== before.person) state.joint = -1;
  show(before);
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const changes = { person: data.persons.findIndex((p) => String(p.number) === asked.get("person")) };
  if (changes.person < 0) changes.person = 0;
  const person = decode(data.persons[changes.person]), text = asked.get("hypothesis");
  if (/^\d+$/.test(text) && Number(text) < data.hypotheses) changes.hypothesis = Number(text);
  else changes.hypothesis = person.mode ? "mode" : person.order[0];
  if (VIEWS[asked.get("view")]) Object.assign(changes, VIEWS[asked.get("view")]);
  for (const name of TOGGLES) if (asked.has(name)) changes[name] = asked.get(name) === "1";
  set(changes);
}

function writeAddress() {
  const address = `#person=${current().number}&hypothesis=${state.hypothesis}`;
  try {
    history.replaceState(null, "", address);
  } catch { /* not allowed where the page is embedded */ }
}

// --- what the detector sees

const svg = $("#seen svg");

function element(name, attributes, parent) {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  return parent.appendChild(made);
}

/** Semi-axes and angle in degrees of one standard deviation of a covariance [a, b, b, c]. */
function ellipse([a, b, , c]) {
  const middle = (a + c) / 2, apart = Math.hypot((a - c) / 2, b);
  const axis = (value) => Math.sqrt(Math.max(value, 0));
  return { rx: axis(middle + apart), ry: axis(middle - apart), angle: (Math.atan2(2 * b, a - c) * 90) / Math.PI };
}

function colours() {
  const styles = getComputedStyle(document.documentElement);
  const read = (name) => {
    const hex = parseInt(styles.getPropertyValue(`--${name}`).trim().slice(1), 16);
    return [hex >> 16, (hex >> 8) & 255, hex & 255];
  };
  return { sides: SIDES.map(read), paper: read("pad"), line: read("muted") };
}

/** The heatmaps of all joints, or of one, as a picture in the joints' colours, mixed by weight. */
function heatmapPicture(person) {
  const [height, width] = person.size, cells = height * width;
  person.maps ??= bytes(person.heatmaps);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const sides = colours().sides, top = Math.max(...person.peak, 1e-12);
  const joints = state.joint < 0 ? [...person.peak.keys()] : [state.joint];
  for (let i = 0; i < cells; i++) {
    let sum = 0, most = 0;
    const mixed = [0, 0, 0];
    for (const j of joints) {
      // a faint joint is lifted, so that it is seen beside a bright one
      const scale = state.joint < 0 ? Math.sqrt(person.peak[j] / top) : 1;
      const opacity = (person.maps[j * cells + i] / 255) ** 0.8 * scale, weight = opacity * opacity;
      sum += weight;
      most = Math.max(most, opacity);
      sides[SIDE[j]].forEach((c, d) => (mixed[d] += weight * c));
    }
    image.data.set([...mixed.map((c) => c / Math.max(sum, 1e-12)), 225 * most], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function drawSeen() {
  const person = current();
  svg.replaceChildren();
  $("#seen").hidden = !person.fit && !person.heatmaps;
  if ($("#seen").hidden) return;
  const fits = (person.fit ?? []).map((fit) => fit && { ...fit, ...ellipse(fit.covariance) });
  let low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  for (const fit of fits.filter(Boolean)) {
    for (const d of [0, 1]) {
      const reach = 2 * Math.sqrt(fit.covariance[3 * d]);
      low[d] = Math.min(low[d], fit.mean[d] - reach);
      high[d] = Math.max(high[d], fit.mean[d] + reach);
    }
  }
  if (low[0] > high[0]) [low, high] = [[0, 0], person.size ? [person.size[1], person.size[0]] : [1, 1]];
  const margin = 0.06 * Math.max(high[0] - low[0], high[1] - low[1], 1);
  low = low.map((v) => v - margin);
  high = high.map((v) => v + margin);
  if (person.size) {
    low = low.map((v) => Math.max(v, -0.5));
    high = high.map((v, d) => Math.min(v, person.size[1 - d]));
  }
  const box = [high[0] - low[0], high[1] - low[1]];
  svg.setAttribute("viewBox", `${low[0]} ${low[1]} ${box[0]} ${box[1]}`);
  const pixel = Math.max(box[0] / Math.max(svg.clientWidth, 1), box[1] / Math.max(svg.clientHeight, 1)); // in cells
  if (person.picture) {
    const [left, top, right, bottom] = person.picture.box;
    element("image", {
      href: `data:image/png;base64,${person.picture.png}`, x: left, y: top,
      width: right - left, height: bottom - top, preserveAspectRatio: "none",
    }, svg);
  }
  if (person.heatmaps) {
    const [height, width] = person.size;
    element("image", { href: heatmapPicture(person), x: -0.5, y: -0.5, width, height, preserveAspectRatio: "none" }, svg);
  }
  const heights = labelHeights(fits, 13 * pixel);
  fits.forEach((fit, j) => {
    if (!fit) return;
    const on = state.joint === j, [x, y] = fit.mean;
    const group = element("g", { class: SIDES[SIDE[j]] + (on ? " on" : ""), "data-joint": j }, svg);
    const shape = { cx: x, cy: y, rx: 2 * fit.rx, ry: 2 * fit.ry, transform: `rotate(${fit.angle} ${x} ${y})` };
    element("ellipse", { ...shape, class: "halo" }, group);
    element("ellipse", { ...shape, class: "line" }, group);
    element("ellipse", { ...shape, class: "hit" }, group);
    element("circle", { cx: x, cy: y, r: (on ? 5 : 3.5) * pixel, "stroke-width": 1.2 }, group);
  });
  fits.forEach((fit, j) => {
    if (!fit || (state.joint >= 0 && state.joint !== j)) return;
    const right = SIDE[j] === 1;
    const name = element("text", {
      x: fit.mean[0] + (right ? -8 : 8) * pixel, y: heights[j] + 4 * pixel, "text-anchor": right ? "end" : "start",
      "font-size": 11.5 * pixel, "stroke-width": 3 * pixel, class: state.joint === j ? "on" : "",
    }, svg);
    name.textContent = LABEL[j];
  });
}

/** Where to write the names: beside their joints, but lower where they would overlap. */
function labelHeights(fits, apart) {
  const heights = fits.map((fit) => fit && fit.mean[1]);
  for (const side of [0, 1, 2]) {
    const joints = [...fits.keys()].filter((j) => fits[j] && SIDE[j] === side);
    joints.sort((a, b) => heights[a] - heights[b]);
    for (let k = 1; k < joints.length; k++) {
      heights[joints[k]] = Math.max(heights[joints[k]], heights[joints[k - 1]] + apart);
    }
  }
  return heights;
}

svg.addEventListener("pointermove", (event) => {
  const group = event.target.closest("[data-joint]");
  hover(group ? Number(group.dataset.joint) : -1);
});
svg.addEventListener("pointerleave", () => hover(-1));

function hover(joint) {
  if (joint !== state.joint) set({ joint });
}

// --- spread per joint

const list = $("#spread ol");
LABEL.forEach((label, j) => {
  const item = document.createElement("li");
  item.className = SIDES[SIDE[j]];
  item.tabIndex = 0;
  item.innerHTML = "<span></span><span class=bar><i></i><i></i></span><span></span>";
  item.firstChild.textContent = label;
  item.addEventListener("pointerenter", () => hover(j));
  item.addEventListener("pointerleave", () => hover(-1));
  item.addEventListener("focus", () => hover(j));
  item.addEventListener("blur", () => hover(-1));
  list.append(item);
});

function drawSpread() {
  const person = current(), most = Math.max(...person.std, 1e-9);
  [...list.children].forEach((item, j) => {
    const [all, depth] = item.querySelectorAll("i");
    all.style.width = `${(100 * person.std[j]) / most}%`;
    depth.style.width = `${(100 * Math.sqrt(person.variance[j][2])) / most}%`;
    item.lastChild.textContent = person.std[j].toFixed(0);
    item.setAttribute("aria-label", `${LABEL[j]}: ${describe(j)}`);
  });
}

function describe(j) {
  const person = current(), depth = Math.sqrt(person.variance[j][2]);
  return `${person.std[j].toFixed(0)} mm, in depth ${depth.toFixed(0)} mm`;
}

// --- 3D: a camera about the middle of the body; y up and z towards the viewer there

const canvas = $("canvas");
const VIEWS = {
  front: { yaw: 0, pitch: 0, zoom: 1 }, side: { yaw: Math.PI / 2, pitch: 0, zoom: 1 },
  top: { yaw: 0, pitch: Math.PI / 2 - 0.01, zoom: 1 },
};
const START = { yaw: state.yaw, pitch: state.pitch, zoom: state.zoom };
const FIELD = Math.tan((15 * Math.PI) / 180); // half of the vertical angle of view

/** Column-major matrix from mm to clip space, and the direction of the viewer in mm axes. */
function camera() {
  const { middle, radius } = current();
  const aspect = canvas.clientWidth / Math.max(canvas.clientHeight, 1);
  const distance = (1.05 * radius) / (state.zoom * FIELD * Math.min(1, aspect));
  const [cy, sy, cp, sp] = [Math.cos(state.yaw), Math.sin(state.yaw), Math.cos(state.pitch), Math.sin(state.pitch)];
  // rows: right, up and back of the camera, in mm axes (y down, z away)
  const rows = [[cy, 0, sy], [-sp * sy, -cp, sp * cy], [cp * sy, -sp, -cp * cy]];
  const at = rows.map((row) => -(row[0] * middle[0] + row[1] * middle[1] + row[2] * middle[2]));
  at[2] -= distance;
  const near = Math.max(distance - 5 * radius, distance / 50), far = distance + 5 * radius;
  const focal = 1 / FIELD, a = (near + far) / (near - far), b = (2 * near * far) / (near - far);
  const matrix = [];
  for (let d = 0; d < 3; d++) matrix.push((focal / aspect) * rows[0][d], focal * rows[1][d], a * rows[2][d], -rows[2][d]);
  matrix.push((focal / aspect) * at[0], focal * at[1], a * at[2] + b, -at[2]);
  return { matrix, back: rows[2] };
}

/** x, y in CSS pixels and depth of a point. */
function project(matrix, points, j) {
  const [x, y, z] = [points[3 * j], points[3 * j + 1], points[3 * j + 2]];
  const row = (r) => matrix[r] * x + matrix[r + 4] * y + matrix[r + 8] * z + matrix[r + 12];
  const w = row(3);
  return [(row(0) / w + 1) * 0.5 * canvas.clientWidth, (1 - row(1) / w) * 0.5 * canvas.clientHeight, w];
}

const PALETTE = "uniform vec3 sides[4];\nvec3 colour(float s) { return s < .5 ? sides[0] : s < 1.5 ? sides[1] : s < 2.5 ? sides[2] : sides[3]; }\n";
const SHADERS = {
  // thin translucent lines and dots: all hypotheses, and the grid
  cloud: [
    `attribute vec4 point; uniform mat4 camera; uniform float size; varying vec3 c; ${PALETTE}
    void main() { gl_Position = camera * vec4(point.xyz, 1); gl_PointSize = size; c = colour(point.w); }`,
    `precision mediump float; uniform float alpha; varying vec3 c;
    void main() { gl_FragColor = vec4(c * alpha, alpha); }`,
  ],
  // thick round lines from a to b with a halo; a joint has a = b
  bones: [
    `attribute vec3 a, b; attribute vec4 corner; uniform mat4 camera; uniform vec2 pixels;
    varying vec2 p; varying float length_, radius; varying vec3 c; ${PALETTE}
    void main() {
      vec4 u = camera * vec4(a, 1), v = camera * vec4(b, 1);
      vec2 s = u.xy / u.w * pixels * .5, t = v.xy / v.w * pixels * .5;
      length_ = distance(s, t);
      vec2 along = length_ > .01 ? (t - s) / length_ : vec2(1, 0);
      radius = corner.w;
      float reach = radius * 1.6 + 2.;
      p = vec2(corner.x < 0. ? -reach : length_ + reach, corner.y * reach);
      gl_Position = vec4((s + along * p.x + vec2(-along.y, along.x) * p.y) / pixels * 2., 0, 1);
      c = colour(corner.z);
    }`,
    `precision mediump float; uniform vec3 halo; varying vec2 p; varying float length_, radius; varying vec3 c;
    void main() {
      float d = distance(p, vec2(clamp(p.x, 0., length_), 0));
      float inside = clamp(radius - d + .5, 0., 1.), alpha = clamp(radius * 1.45 - d + .5, 0., 1.);
      gl_FragColor = vec4(mix(halo, c, inside) * alpha, alpha);
    }`,
  ],
  // translucent ellipsoids with a rim
  ellipsoids: [
    `attribute vec4 point; attribute vec3 normal; uniform mat4 camera; uniform vec3 back;
    varying float facing; varying vec3 c; ${PALETTE}
    void main() { gl_Position = camera * vec4(point.xyz, 1); facing = dot(normalize(normal), back); c = colour(point.w); }`,
    `precision mediump float; varying float facing; varying vec3 c;
    void main() {
      if (facing < 0.) discard;
      float alpha = .07 + .6 * pow(1. - facing, 3.);
      gl_FragColor = vec4(c * alpha, alpha);
    }`,
  ],
};

const gl = canvas.getContext("webgl", { antialias: true, alpha: false });
let programs, buffers, uploaded;

function prepare() {
  programs = {};
  for (const name in SHADERS) {
    const program = gl.createProgram();
    SHADERS[name].forEach((source, k) => {
      const shader = gl.createShader(k ? gl.FRAGMENT_SHADER : gl.VERTEX_SHADER);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    });
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
      throw new Error(`${name}: ${gl.getProgramInfoLog(program)}`);
    }
    programs[name] = program;
  }
  buffers = {};
  uploaded = -1;
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
}

function fill(name, numbers, stride) {
  buffers[name] ??= { buffer: gl.createBuffer() };
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name].buffer);
  gl.bufferData(gl.ARRAY_BUFFER, numbers, gl.STATIC_DRAW);
  buffers[name].count = numbers.length / stride;
}

const boneSide = ([a, b]) => (SIDE[a] === SIDE[b] ? SIDE[a] : 2);

function upload() {
  const person = current(), { points } = person, M = data.hypotheses;
  const lines = new Float32Array(M * data.bones.length * 8), dots = new Float32Array(M * J * 4);
  let at = 0;
  for (let m = 0; m < M; m++) {
    for (const bone of data.bones) {
      for (const j of bone) {
        lines.set(points.subarray(3 * (m * J + j), 3 * (m * J + j) + 3), at);
        lines[at + 3] = boneSide(bone);
        at += 4;
      }
    }
  }
  for (let i = 0; i < M * J; i++) {
    dots.set(points.subarray(3 * i, 3 * i + 3), 4 * i);
    dots[4 * i + 3] = SIDE[i % J];
  }
  fill("lines", lines, 4);
  fill("dots", dots, 4);
  fill("grid", grid(person), 4);
  fill("ellipsoids", ellipsoids(person), 7);
  uploaded = state.person;
}

/** Squares of 200 mm below the lowest joint. */
function grid({ mean, middle, std }) {
  const half = 800, step = 200, numbers = [];
  const y = Math.max(...std.map((s, j) => mean[3 * j + 1]));
  const [x, z] = [middle[0], middle[2]].map((v) => Math.round(v / step) * step);
  for (let k = -half; k <= half; k += step) {
    numbers.push(x + k, y, z - half, 3, x + k, y, z + half, 3, x - half, y, z + k, 3, x + half, y, z + k, 3);
  }
  return new Float32Array(numbers);
}

/** Spheres mapped by the Cholesky factors of the covariances: triangles of point, side, normal. */
function ellipsoids({ mean, covariance }) {
  const [around, along] = [32, 16], numbers = [];
  for (let j = 0; j < J; j++) {
    const c = covariance.slice(9 * j, 9 * j + 9), root = (v) => Math.sqrt(Math.max(v, 1e-2));
    const a = root(c[0]), b = c[3] / a, d = c[6] / a, e = root(c[4] - b * b);
    const f = (c[7] - b * d) / e, g = root(c[8] - d * d - f * f);
    const corner = (i, k) => {
      const [u, v] = [(2 * Math.PI * i) / around, (Math.PI * k) / along];
      const [x, y, z] = [Math.sin(v) * Math.cos(u), Math.cos(v), Math.sin(v) * Math.sin(u)];
      const nz = z / g, ny = (y - f * nz) / e, nx = (x - b * ny - d * nz) / a; // transposed inverse
      const size = Math.hypot(nx, ny, nz);
      numbers.push(
        mean[3 * j] + 2 * a * x, mean[3 * j + 1] + 2 * (b * x + e * y),
        mean[3 * j + 2] + 2 * (d * x + f * y + g * z), SIDE[j], nx / size, ny / size, nz / size,
      );
    };
    for (let i = 0; i < around; i++) {
      for (let k = 0; k < along; k++) {
        for (const [di, dk] of [[0, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1]]) corner(i + di, k + dk);
      }
    }
  }
  return new Float32Array(numbers);
}

/** The selected skeleton, farthest parts first: two triangles for each bone and joint. */
function skeleton(matrix, unit) {
  const pose = selected(), depth = Array.from({ length: J }, (_, j) => project(matrix, pose, j)[2]);
  const parts = data.bones.map((bone) => ({
    a: bone[0], b: bone[1], side: boneSide(bone), radius: 3, depth: (depth[bone[0]] + depth[bone[1]]) / 2,
  }));
  for (let j = 0; j < J; j++) {
    const ends = parts.filter((part) => part.a !== part.b && (part.a === j || part.b === j));
    const nearest = Math.min(depth[j], ...ends.map((part) => part.depth)) - 1; // over its own bones
    parts.push({ a: j, b: j, side: SIDE[j], radius: j === state.joint ? 8 : 5, depth: nearest });
  }
  parts.sort((p, q) => q.depth - p.depth);
  const numbers = [];
  for (const { a, b, side, radius } of parts) {
    for (const [x, y] of [[-1, -1], [1, -1], [1, 1], [-1, -1], [1, 1], [-1, 1]]) {
      for (const j of [a, b]) numbers.push(pose[3 * j], pose[3 * j + 1], pose[3 * j + 2]);
      numbers.push(x, y, side, radius * unit);
    }
  }
  return new Float32Array(numbers);
}

function use(name, buffer, attributes, uniforms) {
  const program = programs[name], stride = attributes.reduce((sum, [, size]) => sum + size, 0);
  gl.useProgram(program);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[buffer].buffer);
  let offset = 0;
  for (const [attribute, size] of attributes) {
    const place = gl.getAttribLocation(program, attribute);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, gl.FLOAT, false, 4 * stride, 4 * offset);
    offset += size;
  }
  for (const key in uniforms) {
    const place = gl.getUniformLocation(program, key), value = uniforms[key];
    if (typeof value === "number") gl.uniform1f(place, value);
    else if (key === "camera") gl.uniformMatrix4fv(place, false, value);
    else if (key === "pixels") gl.uniform2fv(place, value);
    else gl.uniform3fv(place, value);
  }
}

/** One frame of a share of the hypotheses: at most five draw calls, however many there are. */
function draw(share = 1) {
  if (!gl || gl.isContextLost()) return;
  const unit = Math.min(devicePixelRatio || 1, 2);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((v) => Math.max(1, Math.round(v * unit)));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  if (uploaded !== state.person) upload();
  const { matrix, back } = camera(), theme = colours();
  const unitColour = (rgb) => rgb.map((v) => v / 255);
  const sides = [...theme.sides, theme.line].flatMap(unitColour), paper = unitColour(theme.paper);
  gl.viewport(0, 0, width, height);
  gl.clearColor(...paper, 1);
  gl.clear(gl.COLOR_BUFFER_BIT);

  const thin = (buffer, kind, count, alpha, size) => {
    use("cloud", buffer, [["point", 4]], { camera: matrix, sides, alpha, size });
    gl.drawArrays(kind, 0, count);
  };
  thin("grid", gl.LINES, buffers.grid.count, 0.22, 1);
  if (state.cloud) {
    const drawn = Math.ceil(share * data.hypotheses);
    const opacity = Math.min(0.5, Math.max(0.012, 45 / drawn));
    thin("lines", gl.LINES, 2 * data.bones.length * drawn, opacity, 1);
    thin("dots", gl.POINTS, J * drawn, Math.min(1, 3 * opacity), 2 * unit);
  }
  if (state.ellipsoids) {
    use("ellipsoids", "ellipsoids", [["point", 4], ["normal", 3]], { camera: matrix, sides, back });
    gl.drawArrays(gl.TRIANGLES, 0, buffers.ellipsoids.count);
  }
  fill("skeleton", skeleton(matrix, unit), 10);
  use("bones", "skeleton", [["a", 3], ["b", 3], ["corner", 4]], { camera: matrix, sides, pixels: [width, height], halo: paper });
  gl.drawArrays(gl.TRIANGLES, 0, buffers.skeleton.count);
  drawNames(matrix);
}

const stage = $(".stage"), tip = $("#tip");
const names = LABEL.map((label) => {
  const name = Object.assign(document.createElement("span"), { className: "name", textContent: label });
  name.setAttribute("aria-hidden", "true");
  name.hidden = true;
  return stage.appendChild(name);
});

/** Names beside the joints, away from the middle of the body; more is said of the one hovered. */
function drawNames(matrix) {
  const pose = selected(), places = LABEL.map((_, j) => project(matrix, pose, j));
  const middle = places.reduce((sum, [x]) => sum + x, 0) / J;
  const put = (part, j) => {
    const [x, y] = places[j], left = x < middle;
    part.style.transform = `translate(${x + (left ? -12 : 12)}px, ${y}px) translate(${left ? -100 : 0}%, -50%)`;
  };
  names.forEach((name, j) => {
    name.hidden = !state.names || j === state.joint;
    if (!name.hidden) put(name, j);
  });
  tip.hidden = state.joint < 0;
  if (tip.hidden) return;
  tip.textContent = `${LABEL[state.joint]}: ${describe(state.joint)}`;
  put(tip, state.joint);
}

// Where frames take long (no GPU), fewer hypotheses are drawn while things move, all at rest.
const pace = { waiting: 0, last: -Infinity, share: 1, rest: 0 };

function redraw() {
  pace.waiting ||= requestAnimationFrame((now) => {
    const took = now - pace.last;
    if (took < 1000) {
      if (took > 40) pace.share = Math.max(0.02, pace.share * 0.6);
      else if (took < 20) pace.share = Math.min(1, pace.share * 1.05);
    }
    Object.assign(pace, { waiting: 0, last: now });
    draw(pace.share);
    clearTimeout(pace.rest);
    if (pace.share < 1) pace.rest = setTimeout(draw, 250);
  });
}

// --- turning and zooming

const pointers = new Map();

function turn(dx, dy) {
  const limit = Math.PI / 2 - 0.01;
  set({ yaw: state.yaw - dx, pitch: Math.max(-limit, Math.min(limit, state.pitch + dy)) });
}

function zoom(factor) {
  set({ zoom: Math.max(0.2, Math.min(8, state.zoom * factor)) });
}

canvas.addEventListener("pointerdown", (event) => {
  pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
  canvas.setPointerCapture(event.pointerId);
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
}
canvas.addEventListener("pointermove", (event) => {
  const at = [event.offsetX, event.offsetY], before = pointers.get(event.pointerId);
  if (!before) {
    hover(nearest(at));
    return;
  }
  pointers.set(event.pointerId, at);
  if (pointers.size === 1) {
    turn((at[0] - before[0]) / 150, (at[1] - before[1]) / 150);
  } else {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const apart = (p) => Math.max(1, Math.hypot(p[0] - other[0], p[1] - other[1]));
    zoom(apart(at) / apart(before));
  }
});
canvas.addEventListener("pointerleave", () => hover(-1));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.04 : 0.0015)));
}, { passive: false });
canvas.addEventListener("dblclick", () => set(START));
canvas.addEventListener("keydown", (event) => {
  const keys = {
    ArrowLeft: () => turn(-0.1, 0), ArrowRight: () => turn(0.1, 0), ArrowUp: () => turn(0, -0.1), ArrowDown: () => turn(0, 0.1),
    "+": () => zoom(1.15), "=": () => zoom(1.15), "-": () => zoom(1 / 1.15), 0: () => set(START),
  };
  if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  keys[event.key]();
});

/** The joint of the selected skeleton under the pointer, -1 for none. */
function nearest([x, y]) {
  const { matrix } = camera(), pose = selected();
  let best = -1, least = 16;
  for (let j = 0; j < J; j++) {
    const [px, py] = project(matrix, pose, j), apart = Math.hypot(px - x, py - y);
    if (apart < least) [best, least] = [j, apart];
  }
  return best;
}

// --- controls

const TOGGLES = ["cloud", "ellipsoids", "names"];
const rank = $("#rank"), mode = $("#mode"), picker = $("#persons select");
rank.max = data.hypotheses - 1;
rank.value = 0;
for (const person of data.persons) picker.append(new Option(person.number));
$("#persons").hidden = data.persons.length < 2;
picker.addEventListener("change", () => {
  const person = decode(data.persons[picker.selectedIndex]);
  set({ person: picker.selectedIndex, hypothesis: person.mode ? "mode" : person.order[0] });
});
rank.addEventListener("input", () => set({ hypothesis: current().order[rank.value] }));
mode.addEventListener("click", () => set({ hypothesis: state.hypothesis === "mode" ? current().order[rank.value] : "mode" }));
for (const name of TOGGLES) $(`#${name}`).addEventListener("change", (event) => set({ [name]: event.target.checked }));
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => set(VIEWS[button.dataset.view]));
}

function drawControls() {
  const person = current(), m = state.hypothesis;
  mode.hidden = !person.mode;
  mode.setAttribute("aria-pressed", String(m === "mode"));
  if (m !== "mode") rank.value = person.rank[m];
  for (const name of TOGGLES) $(`#${name}`).checked = state[name];
  let text = "The mode: the pose of the latent z = 0";
  if (m !== "mode") {
    text = `Hypothesis ${m}`;
    if (person.value) {
      const place = `${(person.rank[m] + 1).toLocaleString("en")} of ${data.hypotheses.toLocaleString("en")}`;
      text += `, log-probability ${person.value[m].toFixed(2)} nats, ${place} by it`;
    }
  }
  $("#chosen").textContent = text;
  rank.setAttribute("aria-valuetext", text);
  if (!person.value) rank.setAttribute("aria-label", "Hypothesis, in the order of the file");
  picker.selectedIndex = state.person;
  const surest = person.std.indexOf(Math.min(...person.std)), least = person.std.indexOf(Math.max(...person.std));
  $("#subtitle").textContent =
    `${data.hypotheses.toLocaleString("en")} hypotheses of person ${person.number}; spread from ` +
    `${person.std[surest].toFixed(0)} mm (${LABEL[surest]}) to ${person.std[least].toFixed(0)} mm (${LABEL[least]})`;
}

/** Show the state; what did not change since `before` is left as it is. */
function show(before) {
  const changed = (...keys) => !before || keys.some((key) => state[key] !== before[key]);
  if (changed("person")) drawSpread();
  if (changed("person", "joint")) {
    drawSeen();
    [...list.children].forEach((item, j) => item.classList.toggle("on", j === state.joint));
  }
  if (changed("person", "hypothesis", ...TOGGLES)) drawControls();
  if (changed("person", "hypothesis")) writeAddress();
  redraw();
}

// --- start

if (gl) {
  prepare();
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => (prepare(), redraw()));
} else {
  for (const gone of [canvas, $("#views"), $("#hint")]) gone.hidden = true;
  $("#no-webgl").hidden = false;
}
readAddress();
show();
addEventListener("hashchange", readAddress);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show());
const resized = new ResizeObserver(() => (drawSeen(), draw(pace.share), redraw())); // before it is painted
for (const part of [stage, $("#seen")]) resized.observe(part);
