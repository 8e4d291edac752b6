//! One front-end, from its first message to its last.
//!
//! Strict about memory and indices, forgiving about order and repetition: QEMU enables rings before
//! it sets features and repeats messages for each queue pair, cloud-hypervisor comes back with a
//! wrong ring base, user-mode Linux pads its memory table. A ring starts as soon as all its parts
//! are there, in whatever order they came. A message that is refused costs that message: it is
//! logged once, answered with failure if the front-end asked for an answer, and the connection goes
//! on.
//!
//! May touch: the connection, the worker through `link`. Read first: the vhost-user specification.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::inflight;
use super::link::Link;
use super::message::{Channel, Ended, Message};
use super::request::{ConfigRange, Refusal, Request, awaits_reply};
use super::vring::{Kick, Vring};
use crate::device::DeviceConfig;
use crate::device::command::{Command, Reply, RingStart};
use crate::device::config_space::ConfigSpace;
use crate::device::features::{Feature, Features};
use crate::device::guest_mem::{GuestMemory, RegionError};
use crate::device::ring::SharedMemory;
use crate::device::sys::Notifier;
use crate::limits::{COMPLAINTS_PER_CONNECTION_MAX, MEMORY_SLOTS_MAX, QUEUE_PAIRS_MAX, VRINGS_MAX};

/// Protocol features offered. Not `INBAND_NOTIFICATIONS` (QEMU acknowledges it and then has no
/// descriptors), not logging, post-copy or device state: nothing here serves them.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MTU)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// How a request is answered if it is carried out.
enum Answer {
    /// By an acknowledgement, if one was asked for.
    Done,
    /// By this payload.
    Payload(Vec<u8>),
    /// By this payload and descriptor.
    WithDescriptor(Vec<u8>, OwnedFd),
}

/// Why a request was not carried out.
enum Fault {
    /// It costs the message.
    Refused(Refusal),
    /// It costs the connection.
    Ended(Ended),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Fault {
        Fault::Refused(refusal)
    }
}

impl From<RegionError> for Fault {
    fn from(error: RegionError) -> Fault {
        Fault::Refused(error.into())
    }
}

/// A front-end and what it negotiated.
pub(super) struct Connection<'a> {
    channel: Channel,
    link: &'a mut Link,
    config: &'a DeviceConfig,
    offered: Features,
    features: Features,
    protocol_features: u64,
    memory: SharedMemory,
    vrings: [Vring; VRINGS_MAX],
    ip_mtu: u16,
    /// The device status as the front-end keeps it (virtio 1.3, 2.1).
    status: u64,
    /// Held for the front-end: user-mode Linux insists on giving it. Nothing is ever asked of it.
    backend_channel: Option<OwnedFd>,
    complaints: HashSet<(u32, String)>,
    /// What was logged as negotiated last.
    announced: Option<Features>,
    /// It said something, and the worker knows of it.
    attached: bool,
}

impl<'a> Connection<'a> {
    pub(super) fn new(channel: Channel, link: &'a mut Link, config: &'a DeviceConfig) -> Connection<'a> {
        Connection {
            channel,
            link,
            config,
            offered: Features::offered(config.mac.is_some()),
            features: Features::NONE,
            protocol_features: 0,
            memory: SharedMemory::default(),
            vrings: std::array::from_fn(|_| Vring::default()),
            ip_mtu: config.ip_mtu.get(),
            status: 0,
            backend_channel: None,
            complaints: HashSet::new(),
            announced: None,
            attached: false,
        }
    }

    /// Whether it ever said anything: who only looks whether the socket is alive does not.
    pub(super) fn spoke(&self) -> bool {
        self.attached
    }

    /// Serves messages until the connection ends.
    pub(super) fn serve(&mut self) -> Ended {
        loop {
            let served = self.channel.receive().and_then(|message| {
                self.attach()?;
                self.serve_message(message)
            });
            if let Err(ended) = served {
                return ended;
            }
        }
    }

    /// Tells the worker of the front-end when it says its first word.
    fn attach(&mut self) -> Result<(), Ended> {
        if !std::mem::replace(&mut self.attached, true) {
            self.link.call(Command::Attached)?;
            self.link.call(Command::IpMtu(self.ip_mtu))?;
        }
        Ok(())
    }

    fn serve_message(&mut self, message: Message) -> Result<(), Ended> {
        let Message { code, need_reply, payload, fds } = message;
        let outcome = match Request::parse(code, &payload, fds) {
            Ok(request) => self.carry_out(request),
            Err(refusal) => Err(Fault::Refused(refusal)),
        };
        let wants_ack = need_reply && self.has(VhostUserProtocolFeatures::REPLY_ACK);
        match outcome {
            Ok(Answer::Done) if wants_ack => self.channel.reply(code, &0u64.to_ne_bytes(), None),
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Payload(payload)) => self.channel.reply(code, &payload, None),
            Ok(Answer::WithDescriptor(payload, fd)) => self.channel.reply(code, &payload, Some(&fd)),
            Err(Fault::Ended(ended)) => Err(ended),
            Err(Fault::Refused(refusal)) => {
                self.complain(code, &refusal);
                if awaits_reply(code) {
                    Err(Ended::NoAnswer)
                } else if wants_ack {
                    self.channel.reply(code, &1u64.to_ne_bytes(), None)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// Logs a refusal, each kind once for a connection.
    fn complain(&mut self, code: u32, refusal: &Refusal) {
        let mut reason = refusal.to_string();
        let mut source = std::error::Error::source(refusal);
        while let Some(error) = source {
            reason = format!("{reason}: {error}");
            source = error.source();
        }
        let key = (code, reason);
        if self.complaints.len() < COMPLAINTS_PER_CONNECTION_MAX && !self.complaints.contains(&key) {
            let name = message_name(code);
            tracing::warn!(message = %name, reason = %key.1, "vhost-user message refused");
            self.complaints.insert(key);
        }
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    fn call(&mut self, command: Command) -> Result<Reply, Fault> {
        self.link.call(command).map_err(Fault::Ended)
    }

    fn carry_out(&mut self, request: Request) -> Result<Answer, Fault> {
        match request {
            Request::Nothing => {}
            Request::GetFeatures => return Ok(number(self.offered.bits())),
            Request::SetFeatures(bits) => self.set_features(Features::from_bits(bits))?,
            Request::GetProtocolFeatures => return Ok(number(PROTOCOL_FEATURES.bits())),
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits)?,
            Request::GetQueueNum => return Ok(number(QUEUE_PAIRS_MAX as u64)),
            Request::GetMaxMemSlots => return Ok(number(MEMORY_SLOTS_MAX as u64)),
            Request::SetMemTable(table) => {
                let memory = self.memory.replaced(table)?;
                self.set_memory(memory)?;
            }
            Request::AddMemReg(spec, file) => {
                let memory = self.memory.with_added(spec, file)?;
                self.set_memory(memory)?;
            }
            Request::RemMemReg(spec) => {
                let memory = self.memory.with_removed(&spec)?;
                self.set_memory(memory)?;
            }
            Request::NetSetMtu(bytes) => self.set_mtu(bytes)?,
            Request::SetBackendReqFd(fd) => self.backend_channel = Some(fd),
            Request::GetConfig(request) => return Ok(Answer::Payload(self.read_config(&request))),
            Request::GetInflightFd(request) if request.queues == 0 || request.queue_size == 0 => {
                return Ok(Answer::Payload(inflight::none(&request)));
            }
            Request::GetInflightFd(request) => {
                let (payload, fd) = inflight::create(&request)?;
                return Ok(Answer::WithDescriptor(payload, fd));
            }
            Request::SetInflightFd(area, fd) => inflight::check(&area, fd)?,
            Request::ResetDevice => self.reset_device()?,
            Request::SetStatus(status) => self.set_status(status)?,
            Request::GetStatus => return Ok(number(self.status)),
            ring => return self.carry_out_ring(ring),
        }
        Ok(Answer::Done)
    }

    fn carry_out_ring(&mut self, request: Request) -> Result<Answer, Fault> {
        match request {
            Request::SetVringNum(index, size) => {
                self.check_standing(index, self.vrings[index].size == Some(size))?;
                self.vrings[index].size = Some(size);
                self.start_if_complete(index)?;
            }
            Request::SetVringAddr(index, addrs) => {
                self.check_standing(index, self.vrings[index].addrs == Some(addrs))?;
                self.vrings[index].addrs = Some(addrs);
                self.start_if_complete(index)?;
            }
            Request::SetVringBase(index, base) => self.vrings[index].base = base,
            Request::GetVringBase(index) => {
                self.stop(index)?;
                let at = self.vrings[index].base;
                let mut payload = (index as u32).to_ne_bytes().to_vec();
                payload.extend_from_slice(&u32::from(at).to_ne_bytes());
                return Ok(Answer::Payload(payload));
            }
            Request::SetVringKick(index, fd) => self.set_kick(index, fd)?,
            Request::SetVringCall(index, fd) => {
                let call = fd.map(Notifier::new);
                self.vrings[index].call.clone_from(&call);
                if self.vrings[index].started {
                    self.call(Command::Call(index as u16, call))?;
                }
            }
            Request::SetVringErr(index, fd) => {
                let err = fd.map(Notifier::new);
                self.vrings[index].err.clone_from(&err);
                if self.vrings[index].started {
                    self.call(Command::Err(index as u16, err))?;
                }
            }
            Request::SetVringEnable(index, on) => {
                self.vrings[index].set_enable(on);
                self.tell_enabled(index)?;
            }
            _ => unreachable!("carry_out hands on ring requests only"),
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, acked: Features) -> Result<(), Fault> {
        let beyond = acked.beyond(self.offered);
        let features = Features::effective(acked, self.offered);
        if features != self.features {
            self.features = features;
            self.call(Command::Features(features))?;
            for index in 0..VRINGS_MAX {
                self.tell_enabled(index)?;
            }
            self.announce();
        }
        if beyond == Features::NONE { Ok(()) } else { Err(Refusal::Features(beyond.to_string()).into()) }
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<(), Fault> {
        self.protocol_features = bits & PROTOCOL_FEATURES.bits();
        let beyond = bits & !PROTOCOL_FEATURES.bits();
        if beyond == 0 { Ok(()) } else { Err(Refusal::Features(format!("protocol bits {beyond:#x}")).into()) }
    }

    fn set_memory(&mut self, memory: GuestMemory) -> Result<(), Fault> {
        tracing::debug!(
            regions = memory.region_count(),
            size_bytes = memory.size_bytes(),
            "guest memory mapped"
        );
        self.memory = Arc::new(memory);
        self.call(Command::Memory(Arc::clone(&self.memory)))?;
        for index in 0..VRINGS_MAX {
            self.start_if_complete(index)?;
        }
        Ok(())
    }

    fn set_mtu(&mut self, bytes: u64) -> Result<(), Fault> {
        let asked = u16::try_from(bytes).ok().and_then(crate::config::IpMtu::new);
        let asked = asked.ok_or(Refusal::Value("an MTU no guest can use (576 to 65521)"))?;
        self.ip_mtu = asked.get().min(self.config.ip_mtu.get());
        self.call(Command::IpMtu(self.ip_mtu))?;
        Ok(())
    }

    /// The configuration read, or an empty payload: the specification's way to say no.
    fn read_config(&self, range: &ConfigRange) -> Vec<u8> {
        let space = ConfigSpace { mac: self.config.mac, ip_mtu: self.ip_mtu };
        let Some(bytes) = space.read(range.offset_bytes, range.size_bytes) else { return Vec::new() };
        let mut payload = Vec::new();
        for word in [range.offset_bytes, range.size_bytes, range.flags] {
            payload.extend_from_slice(&word.to_ne_bytes());
        }
        payload.extend_from_slice(&bytes);
        payload
    }

    fn reset_device(&mut self) -> Result<(), Fault> {
        for index in 0..VRINGS_MAX {
            self.stop(index)?;
            self.vrings[index].reset();
        }
        self.status = 0;
        Ok(())
    }

    fn set_status(&mut self, status: u64) -> Result<(), Fault> {
        self.status = status;
        if status == 0 {
            for index in 0..VRINGS_MAX {
                self.stop(index)?;
            }
        }
        Ok(())
    }

    fn set_kick(&mut self, index: usize, fd: Option<OwnedFd>) -> Result<(), Fault> {
        if self.vrings[index].started {
            let reply = self.call(Command::Kick(index as u16, fd))?;
            return match reply {
                Reply::NotStarted(why) => Err(Refusal::Start { index, why }.into()),
                _ => Ok(()),
            };
        }
        self.vrings[index].kick = fd.map_or(Kick::Polled, Kick::Descriptor);
        self.start_if_complete(index)
    }

    /// Refuses to change the size or addresses of a running ring; repeating them is fine.
    fn check_standing(&self, index: usize, unchanged: bool) -> Result<(), Fault> {
        if self.vrings[index].started && !unchanged {
            return Err(Refusal::Value("a running ring cannot move: stop it first").into());
        }
        Ok(())
    }

    fn start_if_complete(&mut self, index: usize) -> Result<(), Fault> {
        let protocol_features = self.features.has(Feature::PROTOCOL_FEATURES);
        let vring = &mut self.vrings[index];
        if vring.started || !vring.is_complete() || self.memory.region_count() == 0 {
            return Ok(());
        }
        let (Some(size), Some(addrs)) = (vring.size, vring.addrs) else { return Ok(()) };
        let kick = match std::mem::take(&mut vring.kick) {
            Kick::Descriptor(fd) => Some(fd),
            Kick::Polled | Kick::Unset => None,
        };
        let start = RingStart {
            index: index as u16,
            size,
            addrs,
            kick,
            call: vring.call.clone(),
            err: vring.err.clone(),
            enabled: vring.enabled(protocol_features),
        };
        match self.call(Command::Start(Box::new(start)))? {
            Reply::NotStarted(why) => Err(Refusal::Start { index, why }.into()),
            Reply::At(at) => {
                self.vrings[index].started = true;
                tracing::info!(ring = index, size, used_index = at, "ring started");
                self.announce();
                Ok(())
            }
            Reply::Done => Ok(()),
        }
    }

    fn stop(&mut self, index: usize) -> Result<(), Fault> {
        self.vrings[index].kick = Kick::Unset;
        if !std::mem::take(&mut self.vrings[index].started) {
            return Ok(());
        }
        if let Reply::At(at) = self.call(Command::Stop(index as u16))? {
            self.vrings[index].base = at;
            tracing::info!(ring = index, used_index = at, "ring stopped");
        }
        Ok(())
    }

    fn tell_enabled(&mut self, index: usize) -> Result<(), Fault> {
        let enabled = self.vrings[index].enabled(self.features.has(Feature::PROTOCOL_FEATURES));
        if self.vrings[index].started {
            self.call(Command::Enable(index as u16, enabled))?;
        }
        Ok(())
    }

    /// Logs what was negotiated, once a pair of rings runs on it.
    fn announce(&mut self) {
        let a_pair_runs = self.vrings.chunks_exact(2).any(|pair| pair[0].started && pair[1].started);
        if a_pair_runs && self.announced != Some(self.features) {
            self.announced = Some(self.features);
            let protocol = VhostUserProtocolFeatures::from_bits_truncate(self.protocol_features);
            tracing::info!(
                features = %self.features,
                protocol_features = %names(protocol),
                regions = self.memory.region_count(),
                "front-end attached"
            );
        }
    }
}

fn names(features: VhostUserProtocolFeatures) -> String {
    let names: Vec<_> = features.iter_names().map(|(name, _)| name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(" ") }
}

fn number(value: u64) -> Answer {
    Answer::Payload(value.to_ne_bytes().to_vec())
}

fn message_name(code: u32) -> String {
    match vhost::vhost_user::message::FrontendReq::try_from(code) {
        Ok(known) => format!("{known:?}"),
        Err(_) => format!("type {code}"),
    }
}
