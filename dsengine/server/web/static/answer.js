// One answer while it streams: its parts, its figures, and what of it goes back to the server with the next question.

export class Answer {
  constructor() {
    this.role = "assistant";
    this.content = "";
    this.reasoning = "";
    this.calls = [];
    this.results = [];
    this.finishReason = null;
    this.error = null;
    this.stopped = false;
    this.usage = null;
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.answered = null;
    this.tokensAtFirst = 0;
  }

  /** Takes in one chunk of the stream. */
  push(chunk) {
    const now = performance.now();
    if (chunk.usage) this.usage = chunk.usage;
    const [choice] = chunk.choices;
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
    if (content || reasoning || calls) {
      if (this.first === null) {
        this.first = now;
        this.tokensAtFirst = chunk.usage?.completion_tokens ?? 0;
      }
      this.last = now;
    }
    this.reasoning += reasoning ?? "";
    if ((content || calls) && this.answered === null) this.answered = now;
    this.content += content ?? "";
    for (const call of calls ?? []) this.pushCall(call);
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  pushCall(piece) {
    const call = (this.calls[piece.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= piece.id ?? "";
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }

  get isThinking() {
    return this.reasoning !== "" && this.answered === null && !this.ended;
  }

  get ended() {
    return this.finishReason !== null || this.stopped || this.error !== null;
  }

  /** Seconds between the first and the last of the thoughts. */
  get thinkingSeconds() {
    return this.first === null ? 0 : ((this.answered ?? this.last) - this.first) / 1000;
  }

  /** Figures in words: tokens, speed, time to the first of them. */
  facts() {
    const facts = [];
    const tokens = this.usage?.completion_tokens ?? 0;
    if (tokens) facts.push(`${tokens} tokens`);
    const seconds = this.first === null ? 0 : (this.last - this.first) / 1000;
    if (seconds > 0 && tokens > this.tokensAtFirst) facts.push(`${((tokens - this.tokensAtFirst) / seconds).toFixed(1)} tokens/s`);
    if (this.first !== null) facts.push(`first after ${((this.first - this.asked) / 1000).toFixed(2)} s`);
    const prompt = this.usage?.prompt_tokens;
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (prompt) facts.push(`prompt ${prompt}${cached ? ` (${cached} cached)` : ""}`);
    if (this.finishReason === "length") facts.push("cut off by the limit of tokens");
    if (this.stopped) facts.push("stopped");
    return facts;
  }

  /** Messages of the API that say the same. */
  messages() {
    const message = { role: "assistant", content: this.content };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    const calls = this.calls.filter((call) => call.name);
    if (!calls.length) return [message];
    message.tool_calls = calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
    const results = this.results.map((content, i) => ({ role: "tool", tool_call_id: this.calls[i].id, content }));
    return [message, ...results];
  }
}
