// The server's API as the page uses it: JSON answers, and chat answers as they stream.

/** An error that the server told, or the lack of a server. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Whatever stands between the page and the server has answered in its own words.
  }
  throw new ApiError(response.status, message);
}

/** The text behind a GET route. */
export async function getText(path, key) {
  return (await request(path, { headers: headers(key) })).text();
}

/** The JSON document behind a GET route. */
export async function getJson(path, key) {
  return (await request(path, { headers: headers(key) })).json();
}

/** The chunks of one chat completion. */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(0, "The answer was cut off: the connection ended before its last word.");
}

/** The data of each server-sent event; comments and other fields are skipped. */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let value, done;
      try {
        ({ value, done } = await reader.read());
      } catch (error) {
        if (error.name === "AbortError") throw error;
        return; // The connection broke, which the caller sees by the missing end.
      }
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
