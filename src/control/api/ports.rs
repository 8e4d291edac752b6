//! `/v1/ports`: ports of the host that lead to the guest; one more, and one less.

use std::net::IpAddr;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ErrorBody, OwnerStatus};
use super::{ApiError, Shared};
use crate::config::publish::publish;
use crate::config::{Publish, PublishRange};
use crate::control::ports::{PortError, Published};
use crate::uplink::port_owner::PortOwner;
use crate::uplink::published::Obstacle;

/// Published ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortList {
    /// In the order they were published.
    pub ports: Vec<PortStatus>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortStatus {
    /// Its number, to remove it by; no other gets the same.
    pub id: u64,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Address of the host it is at; 0.0.0.0 for all.
    #[schema(value_type = String)]
    pub host_address: IpAddr,
    /// Port of the host.
    pub host_port: u16,
    /// The one interface whose clients are taken.
    pub interface: Option<String>,
    /// Port of the guest.
    pub guest_port: u16,
    /// All of it as `--publish` takes it.
    pub publish: String,
}

/// What is to be published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPort {
    /// As `--publish` takes it; all of a range, or none of it.
    pub publish: String,
}

/// How a port is removed.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Whether open connections go on; they are reset otherwise.
    #[serde(default)]
    keep: bool,
}

/// What became of a removed port's connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// How many were reset.
    pub connections_reset: u64,
}

impl From<&Published> for PortStatus {
    fn from(Published { id, port }: &Published) -> PortStatus {
        PortStatus {
            id: *id,
            protocol: port.protocol.name().to_owned(),
            host_address: port.host.ip(),
            host_port: port.host.port(),
            interface: port.interface.map(|name| name.to_string()),
            guest_port: port.guest_port,
            publish: port.to_string(),
        }
    }
}

impl From<&PortOwner> for OwnerStatus {
    fn from(owner: &PortOwner) -> OwnerStatus {
        let (pid, process) = owner.process.clone().unzip();
        OwnerStatus { uid: owner.uid, pid, process }
    }
}

impl From<PortError> for ApiError {
    fn from(error: PortError) -> ApiError {
        let message = error.to_string();
        let (status, code) = match &error {
            PortError::NotHere(_) | PortError::CannotClose(_) => (StatusCode::CONFLICT, "not_here"),
            PortError::Known { .. } => (StatusCode::CONFLICT, "published"),
            PortError::FlowHasIt(_) => (StatusCode::CONFLICT, "port_taken"),
            PortError::TooMany => (StatusCode::CONFLICT, "too_many"),
            PortError::Bind(refused) => match &refused.why {
                Obstacle::Taken { owner, .. } => {
                    let owner = owner.as_ref().map(OwnerStatus::from);
                    return ApiError { owner, ..ApiError::new(StatusCode::CONFLICT, "port_taken", message) };
                }
                Obstacle::Privileged { .. } | Obstacle::OldKernel => (StatusCode::FORBIDDEN, "privileged"),
                Obstacle::NoAddress | Obstacle::NoInterface => (StatusCode::BAD_REQUEST, "bad_value"),
                Obstacle::Other => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
            },
            PortError::Serve(..) | PortError::Network(_) | PortError::NotEnded(..) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "failed")
            }
            PortError::Holder(_) => (StatusCode::SERVICE_UNAVAILABLE, "no_answer"),
            PortError::NoAnswer(no_answer) => return (*no_answer).into(),
        };
        ApiError::new(status, code, message)
    }
}

/// What a task of ours that ended by itself is to a client.
fn failed(_: tokio::task::JoinError) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "it failed; the log may say why")
}

/// Ports of the host that lead to the guest
#[utoipa::path(
    get,
    path = "/v1/ports",
    responses((status = 200, body = PortList))
)]
pub(super) async fn list(State(api): Shared) -> Json<PortList> {
    Json(PortList { ports: api.ports.list().await.iter().map(PortStatus::from).collect() })
}

/// Publishes a port, or a range of them: all or none
#[utoipa::path(
    post,
    path = "/v1/ports",
    request_body = NewPort,
    responses(
        (status = 201, description = "Published; port 0 is the port that was picked", body = PortList),
        (status = 400, description = "It cannot be published on this host", body = ErrorBody),
        (status = 403, description = "It needs a privilege", body = ErrorBody),
        (status = 409, description = "Somebody has the port, or no port leads to this guest", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "The body is not this object", body = ErrorBody),
        (status = 500, description = "The kernel or the network refuses", body = ErrorBody),
        (status = 503, description = "A worker, or the network's holder, does not answer", body = ErrorBody),
    )
)]
pub(super) async fn add(
    State(api): Shared,
    body: Result<Json<NewPort>, JsonRejection>,
) -> Result<(StatusCode, Json<PortList>), ApiError> {
    let Json(NewPort { publish: text }) = body?;
    let range = publish(&text).map_err(|error| ApiError::bad_value(format!("publish {text:?}: {error}")))?;
    // Carried out to its end even if the client goes: half a range would be neither there nor known.
    let ports = api.ports.clone();
    let wanted = PublishRange::iter(range).collect();
    let made = tokio::spawn(async move { ports.publish(wanted).await }).await;
    let made = made.map_err(failed)??;
    Ok((StatusCode::CREATED, Json(PortList { ports: made.iter().map(PortStatus::from).collect() })))
}

/// Publishes a port no more; exchanges of datagrams and connections end with it, unless the latter are to be kept
#[utoipa::path(
    delete,
    path = "/v1/ports/{id}",
    params(
        ("id" = String, Path, description = "Its number; or all of it as `--publish` takes it, or `tcp:` or `udp:` and \
         the host's port, where that is one"),
        Removal,
    ),
    responses(
        (status = 200, description = "Removed", body = Removed),
        (status = 400, description = "A value is wrong", body = ErrorBody),
        (status = 404, description = "There is no such port", body = ErrorBody),
        (status = 409, description = "Several are meant, or connections cannot be closed here", body = ErrorBody),
        (status = 500, description = "The network refuses", body = ErrorBody),
        (status = 503, description = "A worker, or the network's holder, does not answer", body = ErrorBody),
    )
)]
pub(super) async fn remove(
    State(api): Shared,
    name: Result<Path<String>, PathRejection>,
    removal: Result<Query<Removal>, QueryRejection>,
) -> Result<Json<Removed>, ApiError> {
    let (Path(name), Query(Removal { keep })) = (name?, removal?);
    let id = find(&api.ports.list().await, &name)?;
    let ports = api.ports.clone();
    let removed = tokio::spawn(async move { ports.remove(id, !keep).await }).await;
    let removed = removed.map_err(failed)??;
    let reset = removed.ok_or_else(|| no_port(&name))?;
    Ok(Json(Removed { connections_reset: reset as u64 }))
}

fn no_port(name: &str) -> ApiError {
    ApiError::not_found(format!("no published port {name:?}"))
}

/// The port that `name` means: its number, all of it as `--publish` takes it, or `tcp:PORT` or `udp:PORT` of the host if
/// only one is meant.
fn find(ports: &[Published], name: &str) -> Result<u64, ApiError> {
    if let Ok(id) = name.parse::<u64>() {
        return ports.iter().find(|port| port.id == id).map(|port| port.id).ok_or_else(|| no_port(name));
    }
    let whole = publish(name).ok().filter(|range| range.count() == 1).and_then(|range| range.iter().next());
    let short = |port: &Publish| format!("{}:{}", port.protocol.name(), port.host.port()) == name;
    let mut meant = ports.iter().filter(|port| whole == Some(port.port) || short(&port.port));
    match (meant.next(), meant.next()) {
        (Some(one), None) => Ok(one.id),
        (None, _) => Err(no_port(name)),
        (Some(one), Some(other)) => {
            let message = format!(
                "{name:?} may be {} ({}) or {} ({}): give its number",
                one.port, one.id, other.port, other.id
            );
            Err(ApiError::new(StatusCode::CONFLICT, "ambiguous", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_meant_by_its_number_by_its_text_or_by_its_host_port() {
        let port = |id, text: &str| Published { id, port: publish(text).unwrap().iter().next().unwrap() };
        let ports =
            [port(1, "8080:80"), port(2, "udp:8080:80"), port(3, "127.0.0.1:9:9"), port(4, "127.0.0.2:9:9")];
        for (name, id) in
            [("1", 1), ("tcp:8080", 1), ("8080:80", 1), ("udp:8080", 2), ("tcp:127.0.0.2:9:9", 4)]
        {
            assert_eq!(find(&ports, name).unwrap(), id, "{name}");
        }
        for (name, code) in
            [("5", "not_found"), ("8080:81", "not_found"), ("tcp:9", "ambiguous"), ("", "not_found")]
        {
            assert_eq!(find(&ports, name).unwrap_err().code, code, "{name}");
        }
    }
}
