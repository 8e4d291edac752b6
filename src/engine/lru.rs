//! Order of last use over table slots: an intrusive list by index, constant time a touch.

/// Marks the list's ends.
const NIL: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    newer: u32,
    older: u32,
    linked: bool,
}

/// The order; slots are named by their index in the owner's table.
#[derive(Debug)]
pub struct Lru {
    links: Vec<Link>,
    newest: u32,
    oldest: u32,
}

impl Default for Lru {
    fn default() -> Lru {
        Lru { links: Vec::new(), newest: NIL, oldest: NIL }
    }
}

impl Lru {
    /// Makes slot `index` the most recently used; adds it if it is new.
    pub fn touch(&mut self, index: usize) {
        let at = index as u32;
        if self.newest == at {
            return;
        }
        if self.links.len() <= index {
            self.links.resize(index + 1, Link { newer: NIL, older: NIL, linked: false });
        }
        self.remove(index);
        self.links[index] = Link { newer: NIL, older: self.newest, linked: true };
        match self.newest {
            NIL => self.oldest = at,
            newest => self.links[newest as usize].newer = at,
        }
        self.newest = at;
    }

    /// Takes slot `index` out, if it is in.
    pub fn remove(&mut self, index: usize) {
        let Some(link) = self.links.get(index).copied().filter(|link| link.linked) else {
            return;
        };
        match link.newer {
            NIL => self.newest = link.older,
            newer => self.links[newer as usize].older = link.older,
        }
        match link.older {
            NIL => self.oldest = link.newer,
            older => self.links[older as usize].newer = link.newer,
        }
        self.links[index].linked = false;
    }

    /// The slot not used for longest.
    pub fn oldest(&self) -> Option<usize> {
        (self.oldest != NIL).then_some(self.oldest as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_touched_comes_first() {
        let mut lru = Lru::default();
        assert_eq!(lru.oldest(), None);
        for index in [3, 1, 2, 3, 1] {
            lru.touch(index);
        }
        let mut order = Vec::new();
        while let Some(index) = lru.oldest() {
            order.push(index);
            lru.remove(index);
        }
        assert_eq!(order, [2, 3, 1]);
        lru.touch(0);
        assert_eq!(lru.oldest(), Some(0));
    }
}
