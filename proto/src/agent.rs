//! Messages and ttrpc stubs generated from `agent.proto`.
//! Holds no hand-written code.

#![allow(missing_docs, unreachable_pub, unused, nonstandard_style, clippy::all)]

mod generated {
    // The generated stubs name the messages by `super::agent`.
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

pub use generated::{
    agent::*,
    agent_ttrpc::{Agent, AgentClient, create_agent},
};
