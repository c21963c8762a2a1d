// The live panel: asks for /metrics every second while it can be seen.

import { byId } from "./dom.js";
import { formatNumber, formatSeconds, formatShare, History, parseMetrics } from "./metrics.js";
import { getText } from "./stream.js";

const INTERVAL_MS = 1000;
const POINTS = 60;

export class LivePanel {
  /** @param {() => string} key gives the API key of the moment */
  constructor(key) {
    this.key = key;
    this.history = new History();
    this.tiles = new Map([...document.querySelectorAll("[data-tile]")].map((tile) => [tile.dataset.tile, tile]));
    this.tiles.get("throughput").append(sparkline());
    this.timer = null;
  }

  start() {
    document.addEventListener("visibilitychange", () => this.schedule(0));
    this.schedule(0);
  }

  schedule(delay) {
    clearTimeout(this.timer);
    if (!document.hidden) this.timer = setTimeout(() => this.read(), delay);
  }

  async read() {
    try {
      this.history.add(performance.now() / 1000, parseMetrics(await getText("metrics", this.key())));
      this.note("");
      this.draw();
    } catch (error) {
      this.note(error.status === 401 ? "Figures need the API key (Settings)." : error.message);
    }
    this.schedule(INTERVAL_MS);
  }

  note(text) {
    byId("live-note").hidden = !text;
    byId("live-note").textContent = text;
  }

  show(name, value, detail = "") {
    const tile = this.tiles.get(name);
    tile.querySelector("b").textContent = value;
    tile.querySelector("small").textContent = detail;
  }

  draw() {
    this.drawTokens();
    this.drawLoad();
    this.drawCache();
    this.drawSpeculation();
    this.drawAnswers();
  }

  drawTokens() {
    const history = this.history;
    const rates = history.rates("dsengine_generation_tokens_total");
    const prompts = history.rates("dsengine_prompt_tokens_total");
    this.show("throughput", formatNumber(rates.at(-1) ?? 0), `peak ${formatNumber(Math.max(0, ...rates))} · prompts ${formatNumber(prompts.at(-1) ?? 0)} tokens/s`);
    plot(this.tiles.get("throughput"), rates);
    for (const [tile, name] of [["ttft", "dsengine_time_to_first_token_seconds"], ["itl", "dsengine_inter_token_latency_seconds"]]) {
      const late = history.quantile(name, 0.95);
      this.show(tile, formatSeconds(history.quantile(name, 0.5)), late === null ? "none in the last minute" : `95 % within ${formatSeconds(late)}`);
    }
  }

  drawLoad() {
    const value = (name) => formatNumber(this.history.value(`dsengine_${name}`));
    this.show("running", value("num_requests_running"), "sequences");
    this.show("waiting", value("num_requests_waiting"), `${value("preemptions_total")} preempted so far`);
  }

  drawCache() {
    const history = this.history;
    const blocks = history.value("dsengine_kv_cache_blocks");
    const used = history.value("dsengine_kv_cache_blocks_in_use");
    const kept = history.value("dsengine_kv_cache_blocks_cached");
    const detail = blocks ? `${formatShare(kept, blocks)} kept for reuse, of ${formatNumber(blocks)} blocks` : "nothing was computed yet";
    this.show("cache", formatShare(used, blocks), detail);
    const width = (count) => String((100 * Math.min(count, blocks)) / Math.max(blocks, 1));
    this.tiles.get("cache").querySelector(".used").setAttribute("width", width(used));
    this.tiles.get("cache").querySelector(".kept").setAttribute("width", width(used + kept));
    const asked = history.growth("dsengine_prompt_tokens_total");
    const overall = `${formatShare(history.value("dsengine_cached_tokens_total"), history.value("dsengine_prompt_tokens_total"))} since the start`;
    this.show("hits", formatShare(history.growth("dsengine_cached_tokens_total"), asked), overall);
  }

  drawSpeculation() {
    const history = this.history;
    if (!history.has("dsengine_spec_draft_tokens_total")) {
      this.show("drafts", "off", "no speculation");
      return;
    }
    const grown = (name) => history.growth(`dsengine_spec_${name}`);
    const trees = grown("accepted_length_count");
    const perTree = trees > 0 ? `${((trees + grown("accepted_length_sum")) / trees).toFixed(2)} tokens a step` : "none in the last minute";
    this.show("drafts", formatShare(grown("accepted_tokens_total"), grown("draft_tokens_total")), perTree);
  }

  drawAnswers() {
    const counts = new Map();
    for (const { labels, value } of this.history.now.get("dsengine_sequences_total") ?? []) counts.set(labels.finish_reason, value);
    const all = [...counts.values()].reduce((sum, count) => sum + count, 0);
    const parts = [...counts].filter(([, count]) => count > 0).map(([reason, count]) => `${reason} ${formatNumber(count)}`);
    this.show("requests", formatNumber(all), parts.join(", "));
  }
}

const SVG = "http://www.w3.org/2000/svg";

function sparkline() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 24`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("spark");
  svg.append(document.createElementNS(SVG, "polygon"), document.createElementNS(SVG, "polyline"));
  return svg;
}

function plot(tile, values) {
  const shown = values.slice(1 - POINTS);
  const top = Math.max(1e-9, ...shown);
  const points = shown.map((value, i) => `${POINTS - shown.length + i},${(22.5 - (21 * value) / top).toFixed(2)}`);
  const left = POINTS - shown.length;
  tile.querySelector("polyline").setAttribute("points", points.join(" "));
  tile.querySelector("polygon").setAttribute("points", points.length ? `${left},24 ${points.join(" ")} ${POINTS - 1},24` : "");
}
