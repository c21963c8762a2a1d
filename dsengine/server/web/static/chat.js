// The conversation: a list of questions and answers, one answer at most under way.

import { Answer } from "./answer.js";
import { byId } from "./dom.js";
import { streamChat } from "./stream.js";
import { AnswerView, questionView } from "./views.js";

export class Chat {
  /** @param settings what a request says beside its messages */
  constructor(settings) {
    this.settings = settings;
    this.model = null;
    this.turns = []; // {question} or {answer, view}, each with its node
    this.abort = null;
    this.list = byId("messages");
    this.scroll = byId("scroll");
    this.onchange = () => {};
    this.onerror = () => {};
  }

  get busy() {
    return this.abort !== null;
  }

  ask(text) {
    const question = text.trim();
    if (!question || this.busy) return;
    this.addQuestion(question);
    this.answer();
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.cut(0);
  }

  /** Drops the turns from `index` on. */
  cut(index) {
    this.stop();
    for (const turn of this.turns.splice(index)) turn.node.remove();
    this.onchange();
  }

  addQuestion(question) {
    const turn = { question };
    const edit = (text) => {
      this.cut(this.turns.indexOf(turn));
      this.whenIdle(() => this.ask(text));
    };
    turn.node = questionView(question, { edit });
    this.add(turn);
  }

  add(turn) {
    this.turns.push(turn);
    this.list.append(turn.node);
    this.scroll.scrollTop = this.scroll.scrollHeight;
    this.onchange();
  }

  /** Answers the last turn. */
  answer() {
    const messages = this.messages();
    const answer = new Answer();
    const turn = { answer };
    turn.view = new AnswerView(answer, {
      regenerate: () => {
        this.cut(this.turns.indexOf(turn));
        this.whenIdle(() => this.answer());
      },
      sendResults: (results) => {
        if (this.busy) return;
        answer.results = results;
        this.cut(this.turns.indexOf(turn) + 1);
        this.answer();
      },
    });
    for (const { view } of this.turns) view?.close();
    turn.node = turn.view.node;
    this.add(turn);
    this.run(answer, turn.view, messages);
  }

  messages() {
    const system = this.settings.system;
    const turns = this.turns.flatMap(({ question, answer }) => (answer ? answer.messages() : [{ role: "user", content: question }]));
    return system ? [{ role: "system", content: system }, ...turns] : turns;
  }

  async run(answer, view, messages) {
    const abort = (this.abort = new AbortController());
    this.onchange();
    const draw = onceAFrame(() => this.keepingBottom(() => view.update()));
    try {
      const options = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
      const body = { model: this.model, messages, ...options, ...this.settings.requestFields() };
      for await (const chunk of streamChat(body, this.settings.key, abort.signal)) {
        answer.push(chunk);
        draw();
      }
    } catch (error) {
      if (abort.signal.aborted) answer.stopped = true;
      else {
        answer.error = error.message;
        this.onerror(error);
      }
    }
    answer.finishReason ??= answer.stopped || answer.error ? null : "stop";
    this.abort = null;
    this.keepingBottom(() => view.update());
    this.onchange();
  }

  /** Runs `then` as soon as the answer that was stopped has ended. */
  whenIdle(then) {
    if (this.busy) setTimeout(() => this.whenIdle(then), 10);
    else then();
  }

  /** A reader who is at the end stays there; one who has scrolled up is left alone. */
  keepingBottom(change) {
    const { scroll } = this;
    const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    change();
    if (atEnd) scroll.scrollTop = scroll.scrollHeight;
  }
}

/** Many calls, one drawing. */
function onceAFrame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}
