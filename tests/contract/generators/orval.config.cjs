module.exports = {
  client: { input: "openapi.json", output: { client: "fetch", target: "orval/client.ts" } },
  zod: { input: "openapi.json", output: { client: "zod", target: "orval/zod.ts" } },
};
