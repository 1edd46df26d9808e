// Streams one completion from a Headrace gateway, and shows what a refusal says.
//
//   generate ADDRESS MODEL PROMPT [MAX_TOKENS]

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

#include <grpcpp/grpcpp.h>

#include "headrace/v1/inference.grpc.pb.h"

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: " << argv[0] << " ADDRESS MODEL PROMPT [MAX_TOKENS]\n";
    return 2;
  }
  auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  auto stub = headrace::v1::InferenceService::NewStub(channel);

  headrace::v1::GenerateRequest request;
  request.set_model(argv[2]);
  request.set_prompt(argv[3]);
  request.mutable_sampling()->set_max_tokens(argc > 4 ? std::atoi(argv[4]) : 16);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  auto stream = stub->Generate(&context, request);
  headrace::v1::GenerateResponse response;
  while (stream->Read(&response)) {
    std::cout << response.text() << std::flush;
  }
  grpc::Status status = stream->Finish();
  if (!status.ok()) {
    // error_details() is a serialized google.rpc.Status: field violations, when to retry.
    std::cerr << "error " << status.error_code() << ": " << status.error_message() << " ("
              << status.error_details().size() << " bytes of details)\n";
    return 1;
  }
  const auto& usage = response.usage();
  std::cerr << "\n" << usage.prompt_tokens() << " + " << usage.completion_tokens() << " tokens\n";
  return 0;
}
