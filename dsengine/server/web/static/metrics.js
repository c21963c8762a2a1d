// What the live panel shows, worked out from two readings of /metrics.

/** One reading: series by name, each a list of {labels, value}. */
export function parseMetrics(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:]+)(?:\{([^}]*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="([^"]*)"/g)].map(([, name, value]) => [name, value]));
    if (!series.has(match[1])) series.set(match[1], []);
    series.get(match[1]).push({ labels, value: match[3] === "+Inf" ? Infinity : Number(match[3]) });
  }
  return series;
}

/** Readings of the last minute. */
export class History {
  constructor(seconds = 60) {
    this.seconds = seconds;
    this.readings = [];
  }

  add(at, series) {
    const last = this.readings.at(-1);
    // Counters that run backwards are those of a server that was started anew.
    if (last && total(series, "dsengine_engine_steps_total") < total(last.series, "dsengine_engine_steps_total")) this.readings = [];
    this.readings.push({ at, series });
    while (this.readings.length > 2 && at - this.readings[0].at > this.seconds) this.readings.shift();
  }

  get now() {
    return this.readings.at(-1).series;
  }

  get then() {
    return this.readings[0].series;
  }

  value(name) {
    return total(this.now, name);
  }

  has(name) {
    return this.now.has(name);
  }

  /** How much a counter has grown in the last minute. */
  growth(name) {
    return total(this.now, name) - total(this.then, name);
  }

  /** A counter's growth per second between each two readings. */
  rates(name) {
    return this.readings.slice(1).map((reading, i) => {
      const before = this.readings[i];
      return (total(reading.series, name) - total(before.series, name)) / Math.max(reading.at - before.at, 1e-3);
    });
  }

  /**
   * A quantile of what a histogram has counted in the last minute, linear inside of its bucket; null: nothing.
   */
  quantile(name, q) {
    const bounds = (this.now.get(`${name}_bucket`) ?? []).map(({ labels, value }, i) => ({
      bound: labels.le === "+Inf" ? Infinity : Number(labels.le),
      count: value - (this.then.get(`${name}_bucket`)?.[i]?.value ?? 0),
    }));
    const all = bounds.at(-1)?.count ?? 0;
    if (!(all > 0)) return null;
    let lower = { bound: 0, count: 0 };
    for (const upper of bounds) {
      if (upper.count >= q * all) {
        if (upper.bound === Infinity) return lower.bound;
        const share = (q * all - lower.count) / Math.max(upper.count - lower.count, 1e-9);
        return lower.bound + share * (upper.bound - lower.bound);
      }
      lower = upper;
    }
    return lower.bound;
  }
}

/** Sum of a metric's series; 0 if there is none. */
function total(series, name) {
  return (series.get(name) ?? []).reduce((sum, { value }) => sum + value, 0);
}

export function formatSeconds(seconds) {
  if (seconds === null) return "–";
  if (seconds < 0.01) return `${(seconds * 1000).toFixed(1)} ms`;
  return seconds < 1 ? `${(seconds * 1000).toFixed(0)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`;
}

export function formatNumber(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

export function formatShare(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–";
}
