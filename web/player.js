/**
 * A player that compares videos: two of n clips at the same frame, by wipe, side by side, difference or blink.
 * It needs nothing of ComfyUI, so that the same file serves other pages.
 *
 * A's clock leads. B is held to it at each frame that A shows, so that the two stay within a frame of one another.
 */

import { icon, iconButton, keepKeys, make, styleSheet } from "./dom.js";
import { fill, texts } from "./text.js";

const MODES = ["wipe", "side", "difference", "blink"];
const SPEEDS = [0.1, 0.25, 0.5, 1, 2];
const BLINK = 600; // ms for which each clip is shown
const SMALL = 320; // pixels of width below which a clip is shown as pixels, not blurred
const NUDGE = 0.08; // how much faster or slower B may run to meet A

/**
 * Puts a player into `element`. clips: [{url, label, frames}], one or more; fps: frames per second; text: the texts of
 * text.js; autoplay: whether it begins by itself, which people who asked for less motion are spared.
 * Returns {update({clips, fps}), destroy()}.
 */
export function createPlayer(element, { clips = [], fps = 8, text = texts(navigator.language), autoplay = true } = {}) {
  styleSheet("player.css");
  const player = new Player(text, autoplay && !matchMedia("(prefers-reduced-motion: reduce)").matches);
  element.append(player.element);
  player.update({ clips, fps });
  return { update: (given) => player.update(given), destroy: () => player.destroy() };
}

class Player {
  constructor(text, autoplay) {
    Object.assign(this, { text, autoplay, clips: [], fps: 8, a: 0, b: 1, mode: "wipe" });
    Object.assign(this, {
      playing: false,
      loops: true,
      rate: 1,
      split: 50,
      frame: 0,
      wanted: null,
      blinking: 0,
      watch: 0,
    });
    this.end = new AbortController(); // takes every listener away at once
    this.videoA = this.video("a");
    this.videoB = this.video("b");
    this.build();
    this.listen();
    this.setMode("wipe");
    this.follow();
  }

  // --- elements ------------------------------------------------------------------------------------------------------

  video(which) {
    const video = make("video", {
      class: which,
      playsinline: true,
      preload: "auto",
      tabindex: "-1",
      "aria-hidden": "true",
    });
    video.muted = true;
    return video;
  }

  build() {
    const { text } = this;
    this.labelA = make("span", { class: "label a" });
    this.labelB = make("span", { class: "label b" });
    this.divider = make("div", { class: "divider", role: "slider", tabindex: "0", "aria-label": text.divider });
    this.frames = make("div", { class: "frames" }, this.videoA, this.videoB);
    this.over = make("div", { class: "over" }, this.labelA, this.labelB, this.divider);
    this.failed = make("p", { class: "failed", role: "alert" });
    this.stage = make(
      "div",
      { class: "stage" },
      make("div", { class: "picture" }, this.frames, this.over),
      this.failed,
    );
    this.element = make(
      "div",
      { class: "cogloom cogloom-player", role: "group", "aria-label": text.player, tabindex: "0", title: "" },
      this.stage,
      this.transport(),
      this.choices(),
    );
    keepKeys(this.element);
  }

  transport() {
    const { text } = this;
    this.playButton = iconButton("play", text.play, () => this.toggle(), { class: "play" });
    this.scrub = make("input", {
      type: "range",
      class: "scrub",
      min: 0,
      step: 1,
      value: 0,
      "aria-label": text.position,
    });
    this.counter = make("output", { class: "counter" });
    this.loopButton = iconButton("loop", text.loop, () => this.setLoop(!this.loops), { "aria-pressed": "true" });
    this.speed = make("select", { class: "cogloom-field", "aria-label": text.speed, title: text.speed });
    this.speed.append(...SPEEDS.map((rate) => make("option", { value: rate, selected: rate === 1 }, `${rate}×`)));
    return make(
      "div",
      { class: "bar" },
      this.playButton,
      iconButton("back", text.step_back, () => this.step(-1)),
      iconButton("next", text.step_on, () => this.step(1)),
      this.scrub,
      this.counter,
      this.loopButton,
      this.speed,
    );
  }

  choices() {
    const { text } = this;
    this.modes = MODES.map((mode) =>
      make(
        "button",
        { type: "button", role: "radio", dataset: { mode }, on: { click: () => this.setMode(mode) } },
        text[mode],
      ),
    );
    this.pickA = make("select", { class: "cogloom-field pick", "aria-label": text.clip_a, title: text.clip_a });
    this.pickB = make("select", { class: "cogloom-field pick", "aria-label": text.clip_b, title: text.clip_b });
    this.gain = make("input", { type: "range", min: 1, max: 16, step: 0.5, value: 4, "aria-label": text.gain });
    this.gainLabel = make("label", { class: "gain", title: text.gain }, this.gain, make("output", {}, "4×"));
    this.pair = make(
      "div",
      { class: "pair" },
      this.pickA,
      iconButton("swap", text.swap, () => this.choose(this.b, this.a)),
      this.pickB,
    );
    const group = make(
      "div",
      { class: "modes", role: "radiogroup", "aria-label": text.mode, title: text.player_keys },
      this.modes,
    );
    return (this.compare = make("div", { class: "bar compare" }, group, this.gainLabel, this.pair));
  }

  listen() {
    const on = (target, type, listener) => target.addEventListener(type, listener, { signal: this.end.signal });
    on(this.element, "keydown", (event) => this.key(event));
    on(this.scrub, "input", () => this.seek(Number(this.scrub.value)));
    on(this.speed, "change", () => this.setRate(Number(this.speed.value)));
    on(this.gain, "input", () => this.setGain());
    on(this.pickA, "change", () => this.choose(Number(this.pickA.value), this.b));
    on(this.pickB, "change", () => this.choose(this.a, Number(this.pickB.value)));
    on(this.videoA, "loadedmetadata", () => this.measure());
    on(this.videoA, "ended", () => this.ended());
    on(this.videoA, "seeked", () => this.seeked());
    for (const [video, which] of [
      [this.videoA, "a"],
      [this.videoB, "b"],
    ]) {
      on(video, "error", () => this.fail(which));
      on(video, "loadeddata", () => this.ready());
    }
    for (const type of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) {
      on(this.over, type, (event) => this.drag(event));
    }
    on(this.divider, "keydown", (event) => this.dividerKey(event));
  }

  // --- what is shown -------------------------------------------------------------------------------------------------

  /** Other clips, or other labels. The mode, the speed and the loop stay as they are. */
  update({ clips = this.clips, fps = this.fps } = {}) {
    Object.assign(this, { clips, fps });
    const fill = (select) =>
      select.replaceChildren(...clips.map(({ label }, n) => make("option", { value: n }, label)));
    fill(this.pickA);
    fill(this.pickB);
    this.compare.hidden = clips.length < 2;
    this.pair.classList.toggle("only", clips.length < 3);
    this.playing = this.autoplay;
    this.choose(
      Math.min(this.a, clips.length - 1),
      clips.length > 1 ? Math.min(Math.max(this.b, 1), clips.length - 1) : -1,
    );
    this.setMode(clips.length > 1 ? this.mode : "wipe");
  }

  /** Shows clip number `a` as A and `b` as B; b is -1 where there is one clip alone. */
  choose(a, b) {
    if (a < 0) return;
    const frame = this.frame;
    Object.assign(this, { a, b });
    this.failed.textContent = "";
    this.load(this.videoA, this.clips[a]);
    this.load(this.videoB, this.clips[b]);
    this.labelA.textContent = this.clips[a].label ?? "";
    this.labelB.textContent = this.clips[b]?.label ?? "";
    this.pickA.value = a;
    this.pickB.value = b;
    this.element.classList.toggle("single", b < 0);
    this.scrub.max = this.length() - 1;
    this.showFrame(Math.min(frame, this.length() - 1));
  }

  load(video, clip) {
    if (!clip) return this.unload(video);
    if (video.dataset.url === clip.url) return;
    video.dataset.url = clip.url;
    video.src = clip.url;
    video.load();
  }

  unload(video) {
    delete video.dataset.url;
    video.removeAttribute("src");
    video.load();
  }

  /** Once both can show a picture they are brought to the frame, and set going if they are to go. */
  ready() {
    if (!this.active().every((video) => video.readyState >= 2)) return;
    if (this.playing) this.play();
    else this.seek(this.frame);
  }

  /** The videos that have a clip. */
  active() {
    return [this.videoA, this.videoB].filter((video) => video.dataset.url);
  }

  measure() {
    const { videoWidth: width, videoHeight: height } = this.videoA;
    this.stage.style.setProperty("--ratio", width / height || 1);
    this.element.classList.toggle("pixelated", width > 0 && width < SMALL);
    this.scrub.max = this.length() - 1;
    this.showFrame(this.frame);
  }

  /** Frames of A: as told, else counted from its length. */
  length() {
    const told = this.clips[this.a]?.frames;
    return Math.max(1, told || Math.round((this.videoA.duration || 0) * this.fps));
  }

  fail(which) {
    const video = which === "a" ? this.videoA : this.videoB;
    if (!video.dataset.url) return; // taking a source away is an error to the element, not to anybody else
    this.failed.textContent = fill(this.text.clip_failed, { label: this.clips[this[which]]?.label ?? "" });
  }

  showFrame(frame) {
    this.frame = frame;
    this.scrub.value = frame;
    this.counter.textContent = fill(this.text.frame_of, { n: frame + 1, all: this.length() });
    this.scrub.setAttribute("aria-valuetext", this.counter.textContent);
  }

  showPlaying() {
    this.playButton.replaceChildren(icon(this.playing ? "pause" : "play"));
    const label = this.playing ? this.text.pause : this.text.play;
    this.playButton.setAttribute("aria-label", label);
    this.playButton.title = label;
  }

  // --- time ----------------------------------------------------------------------------------------------------------

  /** The middle of a frame: at its edge, rounding decides which of two frames is shown. */
  timeOf(frame) {
    return (frame + 0.5) / this.fps;
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  async play() {
    this.playing = true;
    this.showPlaying();
    if (this.videoA.ended || this.frame >= this.length() - 1) this.videoA.currentTime = 0;
    if (this.videoB.dataset.url) this.videoB.currentTime = this.within(this.videoB, this.videoA.currentTime);
    this.setRate(this.rate);
    try {
      await Promise.all(this.active().map((video) => video.play()));
    } catch (error) {
      // A pause or another clip came before it began; that is no fault. What else there is the error event tells.
      if (error.name === "NotAllowedError") this.pause();
    }
  }

  /** Both stop in the middle of one frame, the same for both. */
  pause() {
    this.playing = false;
    for (const video of this.active()) video.pause();
    this.showPlaying();
    this.seek(Math.min(Math.floor(this.videoA.currentTime * this.fps + 1e-3), this.length() - 1));
  }

  step(by) {
    if (this.playing) this.pause();
    const to = (this.wanted ?? this.frame) + by;
    const all = this.length();
    this.seek(this.loops ? (to + all) % all : Math.max(0, Math.min(to, all - 1)));
  }

  /** To a frame. While a seek is under way only the latest wish is kept: a scrub asks faster than a video can. */
  seek(frame) {
    this.showFrame(frame);
    this.wanted = frame;
    if (!this.videoA.seeking) this.go();
  }

  go() {
    if (this.wanted === null || !this.videoA.dataset.url) return;
    const time = this.timeOf(this.wanted);
    this.going = this.wanted;
    for (const video of this.active()) video.currentTime = this.within(video, time);
  }

  seeked() {
    if (this.wanted === this.going) this.wanted = null;
    else this.go();
  }

  /** A time that the video has: a shorter B stands at its last frame while A goes on. */
  within(video, time) {
    return Number.isFinite(video.duration) ? Math.max(0, Math.min(time, video.duration - 0.25 / this.fps)) : time;
  }

  /** A has come to its end. Both go back together: two `loop` attributes would drift apart at every turn. */
  ended() {
    if (!this.playing) return;
    if (!this.loops) return this.pause();
    this.videoA.currentTime = 0;
    this.play();
  }

  /** Called with each frame that A shows. */
  follow() {
    const video = this.videoA;
    const next = (callback) =>
      video.requestVideoFrameCallback ? video.requestVideoFrameCallback(callback) : requestAnimationFrame(callback);
    const look = (_now, shown) => {
      if (this.end.signal.aborted) return;
      const time = shown?.mediaTime ?? video.currentTime;
      if (this.playing && !video.seeking) {
        this.showFrame(Math.min(Math.round(time * this.fps + (shown ? 0 : -0.5)), this.length() - 1));
        this.hold();
      }
      next(look);
    };
    next(look);
  }

  /** B to A's clock: a little faster or slower, or, from half a frame on, at once. */
  hold() {
    const { videoA, videoB } = this;
    if (!videoB.dataset.url || videoB.seeking || videoB.readyState < 2) return;
    const goal = this.within(videoB, videoA.currentTime);
    const ahead = videoB.currentTime - goal;
    if (Math.abs(ahead) > 0.5 / this.fps) {
      videoB.currentTime = goal;
      if (videoB.paused && goal === videoA.currentTime) videoB.play().catch(() => {}); // it had ended; A begins anew
    } else {
      videoB.playbackRate = this.rate * (1 - Math.max(-NUDGE, Math.min(ahead, NUDGE)));
    }
  }

  setRate(rate) {
    this.rate = rate;
    this.speed.value = rate;
    for (const video of [this.videoA, this.videoB]) video.playbackRate = rate;
  }

  setLoop(loops) {
    this.loops = loops;
    this.loopButton.setAttribute("aria-pressed", loops);
  }

  // --- comparison ----------------------------------------------------------------------------------------------------

  setMode(mode) {
    this.mode = mode;
    for (const name of MODES) this.element.classList.toggle(name, name === mode);
    for (const button of this.modes) button.setAttribute("aria-checked", button.dataset.mode === mode);
    this.gainLabel.hidden = mode !== "difference";
    clearInterval(this.blinking);
    this.element.classList.remove("shows-b");
    if (mode === "blink") this.blinking = setInterval(() => this.element.classList.toggle("shows-b"), BLINK);
    this.setGain();
    this.setSplit(this.split);
  }

  setGain() {
    const gain = Number(this.gain.value);
    this.gainLabel.lastChild.textContent = `${gain}×`;
    this.frames.style.filter = this.mode === "difference" ? `brightness(${gain})` : "";
  }

  setSplit(percent) {
    this.split = Math.max(0, Math.min(percent, 100));
    this.element.style.setProperty("--split", `${this.split}%`);
    this.divider.setAttribute("aria-valuenow", Math.round(this.split));
    this.divider.setAttribute("aria-valuemin", 0);
    this.divider.setAttribute("aria-valuemax", 100);
  }

  /** A drag anywhere on the picture moves the divider; a click without movement, in the other modes, plays. */
  drag(event) {
    if (event.type === "pointerdown") {
      if (event.button !== 0) return;
      this.element.focus({ preventScroll: true });
      this.over.setPointerCapture(event.pointerId);
      this.dragging = true;
    }
    if (!this.dragging) return;
    if (this.mode === "wipe" && this.b >= 0 && event.type !== "pointercancel") {
      const { left, width } = this.over.getBoundingClientRect();
      this.setSplit(((event.clientX - left) / width) * 100);
    } else if (event.type === "pointerup") this.toggle();
    if (event.type === "pointerup" || event.type === "pointercancel") this.dragging = false;
  }

  // --- keys ----------------------------------------------------------------------------------------------------------

  dividerKey(event) {
    const by = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation(); // here the arrows move the divider, not the frame
    this.setSplit(this.split + by);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const takesKeys = event.target.matches("select, input");
    const presses = event.target.matches("button, select") && [" ", "Enter"].includes(event.key);
    const action = this.keys()[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || presses || (takesKeys && !/^[ls1-4 ]$/i.test(event.key))) return;
    event.preventDefault();
    action();
  }

  keys() {
    const mode = (n) => () => this.clips.length > 1 && this.setMode(MODES[n]);
    return {
      " ": () => this.toggle(),
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      Home: () => this.step(-(this.wanted ?? this.frame)),
      End: () => this.step(this.length() - 1 - (this.wanted ?? this.frame)),
      1: mode(0),
      2: mode(1),
      3: mode(2),
      4: mode(3),
      l: () => this.setLoop(!this.loops),
      s: () => this.b >= 0 && this.choose(this.b, this.a),
    };
  }

  destroy() {
    this.end.abort();
    clearInterval(this.blinking);
    this.playing = false;
    for (const video of [this.videoA, this.videoB]) {
      video.pause();
      this.unload(video); // lets go of the decoder and the file
    }
    this.element.remove();
  }
}
