package keychain

import "time"

// cacheKey says for what an answer of a plugin counts.
type cacheKey struct {
	plugin string
	kind   string // as plugins call it
	name   string // of the repository or registry
}

// The kinds of keys.
const (
	perImage    = "Image"
	perRegistry = "Registry"
	perAll      = "Global"
)

// An answer is what a plugin has said, and until when it counts; zero: it does not count for
// anybody else.
type answer struct {
	ring  keyring
	until time.Time
}

// cacheKeys are the keys by which an answer for an image is found, in the kubelet's order.
func cacheKeys(plugin, image string) []cacheKey {
	return []cacheKey{{plugin, perImage, image}, {plugin, perRegistry, Host(image)}, {plugin, perAll, ""}}
}

// look returns an answer that counts.
func (k *Kubelet) look(plugin, image string) (answer, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range cacheKeys(plugin, image) {
		if a, ok := k.cached[key]; ok && time.Now().Before(a.until) {
			return a, true
		}
	}
	return answer{}, false
}

// keep makes an answer of a response, for others too as long as that says.
func (k *Kubelet) keep(p plugin, image string, r response) answer {
	duration := p.keep
	if r.keep != nil {
		duration = *r.keep
	}
	a := answer{ring: r.ring}
	if duration <= 0 {
		return a
	}
	a.until = time.Now().Add(duration)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.makeRoom()
	for _, key := range cacheKeys(p.name, image) {
		if key.kind == r.kind {
			k.cached[key] = a
		}
	}
	return a
}

// makeRoom drops what has expired, and if that is nothing, anything: it can be asked for again.
// The caller holds mu.
func (k *Kubelet) makeRoom() {
	if len(k.cached) < maxCached {
		return
	}
	for key, a := range k.cached {
		if !time.Now().Before(a.until) {
			delete(k.cached, key)
		}
	}
	for key := range k.cached {
		if len(k.cached) < maxCached {
			return
		}
		delete(k.cached, key)
	}
}

// Refused has the plugins for an image asked anew.
func (k *Kubelet) Refused(image string) {
	image = Repository(complete(image))
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.plugins {
		for _, key := range cacheKeys(p.name, image) {
			delete(k.cached, key)
		}
	}
}
