package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
)

// Prefix is where the API is, beside nydusd's.
const Prefix = "/api/erofsd/v1"

// maxBody bounds a request's body: a configuration and lists of paths.
const maxBody = 4 << 20

// Handler serves s over HTTP, below Prefix:
//
//	POST /images/mount    MountRequest    → Mount
//	POST /images/unmount  UnmountRequest  → {}
//	POST /images/bind     BindRequest     → {}
//	POST /images/unbind   ImageRequest    → {}
//	POST /images/remove   RemoveRequest   → {}
//	POST /images/pin      PinRequest      → {}
//	POST /images/prefetch PrefetchRequest → {}
//	POST /images/usage    ImageRequest    → Usage
//	GET  /cache                           → Cache
//	POST /cache/evict     EvictRequest    → Cache
//	POST /upgrade         UpgradeRequest  → {}
//	POST /cache/scrub     ScrubRequest    → Scrub
//	GET  /status                          → Status
//	GET  /version                         → VersionInfo
//	GET  /health                          → {}, or 503
func Handler(s Service) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+Prefix+"/images/mount", post(s.Mount))
	mux.Handle("POST "+Prefix+"/images/unmount", act(s.Unmount))
	mux.Handle("POST "+Prefix+"/images/bind", act(s.BindImage))
	mux.Handle("POST "+Prefix+"/images/unbind", act(s.UnbindImage))
	mux.Handle("POST "+Prefix+"/images/remove", act(s.Remove))
	mux.Handle("POST "+Prefix+"/images/pin", act(s.Pin))
	mux.Handle("POST "+Prefix+"/images/prefetch", act(s.Prefetch))
	mux.Handle("POST "+Prefix+"/images/usage", post(s.Usage))
	mux.Handle("GET "+Prefix+"/cache", get(s.Cache))
	mux.Handle("POST "+Prefix+"/cache/evict", post(s.Evict))
	mux.Handle("POST "+Prefix+"/upgrade", act(s.Upgrade))
	mux.Handle("POST "+Prefix+"/cache/scrub", post(s.Scrub))
	mux.Handle("GET "+Prefix+"/status", get(s.Status))
	mux.Handle("GET "+Prefix+"/version", get(s.Version))
	mux.Handle("GET "+Prefix+"/health", get(func(ctx context.Context) (struct{}, error) { return struct{}{}, s.Health(ctx) }))
	return mux
}

// post serves a method that takes a request and gives an answer.
func post[In, Out any](f func(context.Context, In) (Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in In
		if decode(w, r, &in) {
			out, err := f(r.Context(), in)
			answer(w, out, err)
		}
	})
}

// act serves a method without an answer.
func act[In any](f func(context.Context, In) error) http.Handler {
	return post(func(ctx context.Context, in In) (struct{}, error) { return struct{}{}, f(ctx, in) })
}

// get serves a method without a request.
func get[Out any](f func(context.Context) (Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out, err := f(r.Context())
		answer(w, out, err)
	})
}

func decode(w http.ResponseWriter, r *http.Request, v any) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		answer(w, nil, BadRequest(fmt.Errorf("decode request: %w", err)))
		return false
	}
	return true
}

func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := http.StatusInternalServerError
		if e := (*Error)(nil); errors.As(err, &e) {
			status = e.Status
		}
		w.WriteHeader(status)
		v = &Error{Message: err.Error()}
	}
	// A client that left gets no answer, and nobody else is waiting for one.
	_ = json.NewEncoder(w).Encode(v)
}
