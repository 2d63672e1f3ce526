// The server: GET v1/axis, and POST v1/chat/completions as a stream of server-sent events.

const KEY = "personatlas.key";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // without storage the key is asked for again in the next tab
  }
  currentKey = key;
};
let currentKey = null;
const key = () => {
  try {
    return currentKey ?? sessionStorage.getItem(KEY);
  } catch {
    return currentKey;
  }
};

const ask = async (path, options = {}) => {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (!response.ok) throw new ServerError(await reason(response), response.status);
  return response;
};

const reason = async (response) => {
  let message;
  try {
    const { error, detail } = await response.json();
    message = error?.message ?? (typeof detail === "string" ? detail : undefined);
  } catch {
    message = undefined;
  }
  return typeof message === "string" && message ? message : `The server answered ${response.status}.`;
};

export const getAxis = async () => (await ask("v1/axis")).json();

// Chunks as they come; throws for an error in the stream, and for a stream that breaks off before its end.
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError("The server sent something that is not JSON.");
    }
    if (chunk.error) throw new ServerError(String(chunk.error.message ?? "The server gave up on this answer."));
    yield chunk;
  }
  throw new ServerError("The answer broke off: the server closed the connection.");
}

// The data of each event of a stream of server-sent events: lines end by CR, LF or both, an event by an empty line.
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The answer broke off: the connection was lost.");
      }
      rest += part.done ? decoder.decode() + "\n" : decoder.decode(part.value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?=[^\n])/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (part.done) {
        if (data.length) yield data.join("\n");
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
