//! An honest driver of the socket device: proof that what was attacked still serves.

use super::*;

/// Packet header (virtio 1.2, 5.10.6).
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

const HEADER: u32 = 44;
pub const HOST_PORT: u32 = 1024;
/// Above the ports that the attack names.
const FIRST_PORT: u32 = 5000;
const SIZE: u64 = 16;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const RW: u16 = 5;

/// A packet's header from `port` to the host's.
pub fn header(op: u16, port: u32, len: u32) -> Header {
    Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: port,
        dst_port: HOST_PORT,
        len,
        kind: 1,
        op,
        flags: 0,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    }
}

pub fn put(at: u64, header: &Header) {
    store(at, *header);
}

/// Where the rings of the honest driver are, and its buffers.
fn ring(number: u64) -> u64 {
    POOL + (12 << 20) + number * 0x4000
}

fn buffer(number: u64, slot: u64) -> u64 {
    POOL + (13 << 20) + number * (1 << 18) + slot * 4096
}

struct Driver {
    at: u64,
    seen: [u16; 2],
    port: u32,
    taken: u32,
}

/// Dials the host and does what its lines say. Answers whether to attack again.
pub fn talk() -> bool {
    let Some(at) = windows().find(|at| read(at + DEVICE_ID) == 19) else { return false };
    static mut PORT: u32 = FIRST_PORT;
    // SAFETY: there is one thread.
    let port = unsafe {
        PORT += 1;
        PORT
    };
    let mut driver = Driver { at, seen: [0; 2], port, taken: 0 };
    driver.come_up();
    driver.send(REQUEST, b"");
    loop {
        let (op, text) = driver.receive();
        match op {
            RESPONSE => driver.send(RW, b"hello 0\n"),
            RW if text.starts_with(b"again") => return true,
            RW if text.starts_with(b"restart") => return false,
            RW => driver.send(RW, b"ok\n"),
            RST => {
                say(b"hostile guest: the host refuses it\n");
                halt()
            }
            _ => {}
        }
    }
}

impl Driver {
    fn come_up(&mut self) {
        let at = self.at;
        [0, 1, 3].into_iter().for_each(|status| write(at + STATUS, status));
        for half in 0..2 {
            write(at + DRIVER_FEATURES_SELECT, half);
            write(at + DRIVER_FEATURES, half);
        }
        write(at + STATUS, 0xb);
        for number in 0..3 {
            memory_of(ring(number), 0x4000);
            write(at + QUEUE_SELECT, number as u32);
            write(at + QUEUE_SIZE, SIZE as u32);
            for (register, offset) in [(DESCRIPTORS, 0), (AVAILABLE, 0x1000), (USED, 0x2000)] {
                write(at + register, (ring(number) + offset) as u32);
                write(at + register + 4, 0);
            }
            write(at + QUEUE_READY, 1);
        }
        write(at + STATUS, 0xf);
        if read(at + STATUS) != 0xf {
            say(b"hostile guest: the socket device does not come up again\n");
            halt()
        }
        (0..SIZE).for_each(|slot| self.offer(0, slot, 4096, 2));
    }

    fn offer(&mut self, number: u64, slot: u64, len: u32, flags: u16) {
        let (table, available) = (ring(number), ring(number) + 0x1000);
        store(table + 16 * slot, buffer(number, slot));
        store(table + 16 * slot + 8, len);
        store(table + 16 * slot + 12, flags);
        let index: u16 = load(available + 2);
        store(available + 4 + 2 * (u64::from(index) % SIZE), slot as u16);
        store(available + 2, index.wrapping_add(1));
        write(self.at + NOTIFY, number as u32);
    }

    /// Waits for the next entry of a used ring.
    fn used(&mut self, number: u64) -> u64 {
        let used = ring(number) + 0x2000;
        let seen = self.seen[number as usize];
        // SAFETY: it is memory.
        while unsafe { read_volatile((used + 2) as *const u16) } == seen {
            core::hint::spin_loop();
        }
        self.seen[number as usize] = seen.wrapping_add(1);
        u64::from(load::<u32>(used + 4 + 8 * (u64::from(seen) % SIZE)))
    }

    fn send(&mut self, op: u16, text: &[u8]) {
        let at = buffer(1, 0);
        let header = Header { fwd_cnt: self.taken, ..header(op, self.port, text.len() as u32) };
        put(at, &header);
        text.iter().enumerate().for_each(|(n, &byte)| store(at + u64::from(HEADER) + n as u64, byte));
        self.offer(1, 0, HEADER + text.len() as u32, 0);
        self.used(1);
    }

    /// The next packet: what it is and what it carries.
    fn receive(&mut self) -> (u16, &'static [u8]) {
        loop {
            let slot = self.used(0);
            let at = buffer(0, slot);
            let header: Header = load(at);
            let len = header.len as usize;
            let (op, port) = (header.op, header.dst_port);
            let text = (at + u64::from(HEADER)) as *const u8;
            self.taken = self.taken.wrapping_add(header.len);
            // The buffer is offered again at once: the host says one line at a time.
            self.offer(0, slot, 4096, 2);
            if port == self.port && len <= 4096 - HEADER as usize {
                // SAFETY: it is memory.
                return (op, unsafe { core::slice::from_raw_parts(text, len) });
            }
        }
    }
}

fn memory_of(at: u64, len: u64) {
    (0..len / 8).for_each(|n| store(at + 8 * n, 0u64));
}
