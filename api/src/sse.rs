//! The answer as it comes: a request's events become server-sent events. Whatever is at hand goes out as one
//! frame, hence one write.

use crate::{
    error::ApiError,
    running::{Running, Step},
};
use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use forebay_schemas::lifecycle::Lifecycle;
use forebay_streams::log::Recorded;
use serde::Serialize;
use std::convert::Infallible;

/// Proxies such as nginx pass on what they read at once.
const NO_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Writes what happens to a request in the form of one endpoint. It is told every event from the first on, so that what
/// it writes, ids too, is a function of the log: a client that has read a part gets the same rest at any gateway.
pub(crate) trait Teller: Send + 'static {
    /// Writes what an event means to the client, if anything. `state` is as far as the log was read: at least up to this
    /// event, and no further than this if it is a terminal one.
    fn tell(&mut self, frame: &mut BytesMut, recorded: &Recorded, state: &Lifecycle);

    /// Writes that there is no more to come from here.
    fn stopped(&mut self, frame: &mut BytesMut, error: &ApiError);
}

/// A response that tells a request's events. If the client stops reading it, it is dropped, and with it the hold on the
/// request.
pub(crate) fn response(running: Running, teller: impl Teller) -> Response {
    let answer = Box::new(Answer { running, teller, frame: BytesMut::new(), silent: false, ended: false });
    let frames = futures::stream::unfold(answer, |mut answer| async {
        answer.next_frame().await.map(|frame| (Ok::<_, Infallible>(frame), answer))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (NO_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(frames)).into_response()
}

/// An answer on its way.
struct Answer<T> {
    running: Running,
    teller: T,
    /// Its memory is used again for the next frame once the last one is written.
    frame: BytesMut,
    /// Nothing was sent since the last tick of the keep-alive clock.
    silent: bool,
    ended: bool,
}

impl<T: Teller> Answer<T> {
    /// Everything that there is to send now, or waits for something; none after the end.
    async fn next_frame(&mut self) -> Option<Bytes> {
        while !self.ended {
            match self.running.next().await {
                Step::Events(events) => {
                    for recorded in &events {
                        self.teller.tell(&mut self.frame, recorded, self.running.state());
                        self.ended |= recorded.event.body.is_terminal();
                    }
                }
                // What clients skip, and what keeps proxies from closing a silent connection.
                Step::Quiet if self.silent => self.frame.put_slice(b": waiting\n\n"),
                Step::Quiet => self.silent = true,
                Step::Stopped(error) => {
                    self.teller.stopped(&mut self.frame, &error);
                    self.ended = true;
                }
            }
            if !self.frame.is_empty() {
                self.silent = false;
                return Some(self.frame.split().freeze());
            }
        }
        None
    }
}

/// Writes a value as JSON.
pub(crate) fn put_json(frame: &mut BytesMut, value: &impl Serialize) {
    serde_json::to_writer(frame.writer(), value).expect("plain data always encodes into memory");
}
