// The source of the decode kernel, compiled by g++ against the models of ptx.h, and its plan.
#include "cuda/decode.cuh"

#include "cuda/decode_plan.cpp"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> decode_body(const ForwardArgs& args, const DecodePlan& plan) {
  std::function<void()> body;
  const DecodeWork work = plan.work;
  with_type(args.down.x.dtype, [&](auto type) {
    with_decode<decltype(type)>(plan, [&](auto kernel) { body = [=] { kernel(args, work); }; });
  });
  return body;
}

}  // namespace emu
