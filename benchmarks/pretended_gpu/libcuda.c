// A CUDA driver without a device: as much of it as Triton's launcher calls. It answers as one H100 (sm_90) does, reads
// from a kernel's machine code how many arguments it takes and of what size, refuses what a device would refuse, and
// keeps a launch with the values of its arguments in place of running it.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_ARGUMENTS = 512, PARAMETER_INFO = 0x17, OPT_IN = 232448, WITHOUT_OPT_IN = 49152 };

// Addresses with this bit are the device's; see tensors.py.
static const uint64_t DEVICE_BIT = 1ull << 60;

typedef struct {
  int arguments, registers, most_shared;
  int sizes[MOST_ARGUMENTS];
} Kernel;

typedef struct {
  uint64_t number;  // of launches so far
  uint32_t grid[3], block[3], shared, arguments;
  uint32_t sizes[MOST_ARGUMENTS];
  uint64_t values[MOST_ARGUMENTS];  // the first eight bytes
} Launch;

Launch last_launch;

static const Elf64_Shdr* section(const char* image, const char* kind, const char* kernel) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  size_t length = strlen(kind);
  for (int i = 0; i < header->e_shnum; ++i) {
    const char* name = names + sections[i].sh_name;
    if (!strncmp(name, kind, length) && !strcmp(name + length, kernel)) return sections + i;
  }
  return NULL;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* image = (const char*)module;
  const Elf64_Shdr *code = section(image, ".text.", name), *info = section(image, ".nv.info.", name);
  if (!code || !info) return CUDA_ERROR_NOT_FOUND;
  Kernel* kernel = calloc(1, sizeof *kernel);
  kernel->registers = code->sh_info >> 24;
  kernel->most_shared = WITHOUT_OPT_IN;
  // Entries: format, attribute, then two bytes of value or, with format 4, the length of what follows.
  const unsigned char *entry = (const unsigned char*)image + info->sh_offset, *end = entry + info->sh_size;
  while (entry < end) {
    uint16_t length = entry[0] == 4 ? *(const uint16_t*)(entry + 2) : 0;
    if (entry[1] == PARAMETER_INFO) {
      uint16_t ordinal = *(const uint16_t*)(entry + 8);
      if (ordinal >= MOST_ARGUMENTS) return CUDA_ERROR_NOT_SUPPORTED;
      kernel->sizes[ordinal] = *(const uint32_t*)(entry + 12) >> 18;
      if (kernel->arguments <= ordinal) kernel->arguments = ordinal + 1;
    }
    entry += 4 + length;
  }
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = ((Kernel*)function)->registers; return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; return CUDA_SUCCESS;
    default: *value = 0; return CUDA_SUCCESS;
  }
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > OPT_IN) return CUDA_ERROR_INVALID_VALUE;
  ((Kernel*)function)->most_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  const Kernel* kernel = (const Kernel*)function;
  uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  uint64_t blocks = (uint64_t)config->gridDimX * config->gridDimY * config->gridDimZ;
  if (!blocks || config->gridDimX > INT32_MAX || config->gridDimY > 65535 || config->gridDimZ > 65535 || !threads ||
      threads > 1024 || threads * kernel->registers > 65536 || config->sharedMemBytes > (unsigned)kernel->most_shared)
    return CUDA_ERROR_INVALID_VALUE;
  last_launch = (Launch){.number = last_launch.number + 1,
                         .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
                         .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
                         .shared = config->sharedMemBytes,
                         .arguments = kernel->arguments};
  for (int i = 0; i < kernel->arguments; ++i) {
    last_launch.sizes[i] = kernel->sizes[i];
    memcpy(last_launch.values + i, arguments[i], kernel->sizes[i] < 8 ? kernel->sizes[i] : 8);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (!(pointer & DEVICE_BIT)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = OPT_IN; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; return CUDA_SUCCESS;
    default: *value = 1; return CUDA_SUCCESS;  // clock rates and the like, which decide nothing
  }
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = code == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : code == CUDA_ERROR_NOT_FOUND ? "not found" : "error";
  return CUDA_SUCCESS;
}

static int context;

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) { return cuCtxGetCurrent(retained); }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
