#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bulkhead_virtio::testing::fuzz::mmio(bytes));
