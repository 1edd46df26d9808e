// Streams one completion from a Headrace gateway, and shows what a refusal says.
//
//   node generate.mjs ADDRESS MODEL PROMPT [MAX_TOKENS]

import path from "node:path";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, model, prompt, maxTokens = "16"] = process.argv.slice(2);
if (!prompt) {
  console.error("usage: node generate.mjs ADDRESS MODEL PROMPT [MAX_TOKENS]");
  process.exit(2);
}

const here = path.dirname(fileURLToPath(import.meta.url));
const protos = process.env.HEADRACE_PROTOS ?? path.join(here, "../../../protos");
const definition = protoLoader.loadSync("headrace/v1/inference.proto", {
  includeDirs: [protos],
  longs: Number,
  enums: String,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).headrace.v1;

const client = new InferenceService(address, grpc.credentials.createInsecure());
const call = client.Generate(
  { model, prompt, sampling: { maxTokens: Number(maxTokens) } },
  { deadline: Date.now() + 60_000 },
);
let usage;
call.on("data", (response) => {
  process.stdout.write(response.text ?? "");
  usage = response.usage ?? usage;
});
call.on("error", (error) => {
  const details = error.metadata.get("grpc-status-details-bin")[0];
  // A serialized google.rpc.Status: field violations, when to retry.
  console.error(`error ${error.code}: ${error.details} (${details?.length ?? 0} bytes of details)`);
  process.exitCode = 1;
});
call.on("end", () => {
  if (usage) console.error(`\n${usage.promptTokens} + ${usage.completionTokens} tokens`);
});
