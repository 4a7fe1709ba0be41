// 与服务器说话：只问自己这一家，钥匙只在内存里，错误都变成 ApiProblem。

export class ApiProblem extends Error {
  /** @param {number} status 0 = 没有回答 @param {string} code @param {string} message */
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let key = "";

/** @param {string} given */
export function setKey(given) {
  key = given.trim();
}

/**
 * @param {string} path @param {unknown} [body] 有就是 POST @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
async function ask(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (key) headers["Authorization"] = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const sent = body === undefined ? null : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, { method, headers, body: sent, signal: signal ?? null });
  } catch (error) {
    throw lost(error);
  }
  if (!response.ok) throw await refused(response);
  return response;
}

/** 别人叫停的照原样；其余都是没有回答。 @param {unknown} error */
function lost(error) {
  if (error instanceof DOMException && error.name === "AbortError") return error;
  return new ApiProblem(0, "offline", "the server does not answer");
}

/** @param {Response} response */
async function refused(response) {
  try {
    const { error } = await response.json();
    return new ApiProblem(response.status, String(error.code), String(error.message));
  } catch {
    return new ApiProblem(response.status, "http", `the server answered ${response.status}`);
  }
}

/** @param {string} path @param {unknown} [body] @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function json(path, body, signal) {
  const response = await ask(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    throw lost(error);
  }
}

/** @param {string} path @returns {Promise<string>} */
export async function text(path) {
  return (await ask(path)).text();
}

/**
 * 服务器送来的事件，一个个；结尾的 [DONE] 也给出，没有它就是半路断了。
 * @param {string} path @param {unknown} body @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* events(path, body, signal) {
  const response = await ask(path, body, signal);
  if (!response.body) throw new ApiProblem(0, "offline", "the answer has no body");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (held + value).split("\n\n");
      held = parts.pop() ?? "";
      for (const part of parts) {
        // 冒号开头的是 ping。
        if (!part.startsWith("data: ")) continue;
        const data = part.slice("data: ".length);
        const found = data === "[DONE]" ? data : JSON.parse(data);
        if (found.error) {
          throw new ApiProblem(500, String(found.error.code), String(found.error.message));
        }
        yield found;
      }
    }
  } catch (error) {
    throw error instanceof ApiProblem ? error : lost(error);
  } finally {
    await reader.cancel().catch(() => {});
  }
}

const KINDS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array };

/**
 * {dtype, shape, data: base64} -> 数。
 * @param {{dtype: keyof typeof KINDS, shape: number[], data: string}} packed
 * @returns {{shape: number[], data: Uint8Array | Uint16Array | Uint32Array | Float32Array}}
 */
export function unpack(packed) {
  const raw = atob(packed.data);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  const data = new KINDS[packed.dtype](bytes.buffer);
  const size = packed.shape.reduce((a, b) => a * b, 1);
  if (data.length !== size) throw new Error(`${data.length} numbers for a shape of ${size}`);
  return { shape: packed.shape, data };
}
