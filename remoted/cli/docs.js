// The page of /docs: what /openapi.json says, and a form for each route. Texts are set as text, never as HTML.
"use strict";

// The token comes behind the #, which no browser sends anywhere, and stays in this tab.
if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
const headers = { Authorization: "Bearer " + (sessionStorage.getItem("token") || "") };

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

// A value that fits a schema well enough to be edited.
function example(schema, components, depth = 0) {
  if (schema.$ref && depth < 6) return example(components[schema.$ref.split("/").pop()] || {}, components, depth + 1);
  if ("default" in schema) return schema.default;
  if (schema.enum) return schema.enum[0];
  if (schema.anyOf) return example(schema.anyOf[0], components, depth + 1);
  const type = Array.isArray(schema.type) ? schema.type[0] : schema.type;
  if (type === "object") {
    const wanted = schema.required || Object.keys(schema.properties || {});
    return Object.fromEntries(wanted.map((name) => [name, example((schema.properties || {})[name] || {}, components, depth + 1)]));
  }
  if (type === "array") return depth > 4 ? [] : (schema.prefixItems || [schema.items || {}]).map((item) => example(item, components, depth + 1));
  return { integer: 0, number: 0, boolean: false, string: "", null: null }[type] ?? null;
}

function show(path, method, operation, components) {
  const box = make("details");
  const head = make("summary");
  head.append(make("span", method.toUpperCase(), "method"), make("code", path), " ", make("span", operation.summary, "note"));
  box.append(head);
  if (operation.description) box.append(make("p", operation.description));
  const fields = (operation.parameters || []).map((parameter) => {
    const label = make("label", parameter.name + (parameter.required ? " " : " (optional) "));
    const input = make("input");
    label.append(input, " ", make("span", parameter.in + ", " + JSON.stringify(parameter.schema), "note"));
    box.append(label);
    return { parameter, input };
  });
  const schema = operation.requestBody?.content["application/json"].schema;
  const body = schema && make("textarea");
  if (body) {
    body.value = JSON.stringify(example(schema, components), null, 2);
    box.append(body, make("pre", JSON.stringify(schema, null, 2)));
  }
  const button = make("button", "Call");
  const status = make("p", "", "note");
  const result = make("pre");
  button.onclick = () => call(path, method, fields, body, status, result);
  box.append(button, status, result);
  return box;
}

async function call(path, method, fields, body, status, result) {
  const query = new URLSearchParams();
  for (const { parameter, input } of fields) {
    if (parameter.in === "path") path = path.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
    else if (input.value) query.append(parameter.name, input.value);
  }
  const url = path + (query.size ? "?" + query : "");
  status.textContent = "…";
  result.textContent = "";
  try {
    const answer = await fetch(url, { method: method.toUpperCase(), headers, body: body ? body.value : undefined });
    status.textContent = `${answer.status} ${answer.headers.get("Content-Type")}`;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part; !(part = await reader.read()).done; ) result.append(part.value);
  } catch (error) {
    status.textContent = `it broke off: ${error.message}`;
  }
}

async function main() {
  const about = document.getElementById("about");
  const answer = await fetch("/openapi.json", { headers });
  if (!answer.ok) {
    if (answer.status !== 401) about.textContent = `The description cannot be had: ${answer.status}`;
    about.className = "error";
    return;
  }
  const spec = await answer.json();
  about.textContent = "Made from the type hints of the functions; the same as /openapi.json.";
  for (const [path, methods] of Object.entries(spec.paths))
    for (const [method, operation] of Object.entries(methods))
      document.getElementById("routes").append(show(path, method, operation, spec.components.schemas));
}

main();
